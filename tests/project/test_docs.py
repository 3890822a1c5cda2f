import csv
import itertools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import pfgm
from benchmarks.common.rows import select
from benchmarks.studies import (
    budget,
    flow_matching,
    flows,
    pretrained,
    published_losses,
    scaling,
    weighting,
)
from pfgm import cli

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def name(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    """The Python code of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


SLOW = DOCS / "howto" / "latents.md"  # trains for 700 steps
BLOCKS = [
    pytest.param(
        page, code, id=f"{name(page)}-{index}", marks=[pytest.mark.slow] if page == SLOW else []
    )
    for page in PAGES
    for index, code in enumerate(blocks(page))
]


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_code_blocks_run(page, code, tmp_path, monkeypatch):
    """Each block runs as printed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for package in ("accelerate", "diffusers", "k_diffusion", "lightning", "pandas"):
        if re.search(rf"^(import|from) .*\b{package}\b", code, flags=re.MULTILINE):
            pytest.importorskip(package)
    exec(compile(code, name(page), "exec"), {})


EXAMPLES = [(path, path.read_text()) for path in sorted((ROOT / "examples").glob("*.py"))]
FIELDS_OF_FLOWS = [
    pytest.param(code, id=f"{name(page)}-{index}")
    for index, (page, code) in enumerate([*(block.values for block in BLOCKS), *EXAMPLES])
    if ("perturb(" in code and "field_fn(" in code) or ("flow" in code and "pfgm.Field(" in code)
]


def test_fields_of_flows_are_found():
    assert len(FIELDS_OF_FLOWS) == 7  # drop-in three times, ecosystem, three examples


@pytest.mark.parametrize("code", FIELDS_OF_FLOWS)
def test_fields_have_the_gamma_of_their_flow(code):
    """The default gamma is right only for some flows."""
    for line in re.findall(r"^.*\b(?:field_fn|pfgm\.Field)\(.*$", code, flags=re.MULTILINE):
        assert "gamma=" in line or "flow.gamma" in line or "**of_flow" in line, line


@pytest.mark.parametrize(
    "path", [*PAGES, *sorted((ROOT / "examples").glob("*.*"))], ids=lambda path: name(path)
)
def test_networks_of_a_flow_are_made_by_it(path):
    """The defaults of their classes are right only for data of about unit spread around 0."""
    made = re.findall(r"networks\.(?:UNet|MLP|Denoiser)\(.*", path.read_text())
    assert not made, made


@pytest.fixture
def in_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


LOSSES = published_losses.printed_losses()


def test_three_published_losses_are_replaced():
    assert list(LOSSES) == ["PFGM's loss", "The stable target field", "PFGM++'s loss"]


@pytest.mark.parametrize(("before", "after"), LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 8, 8)])
def test_a_published_loss_before_and_after(before, after, shape, in_float64):
    """The two functions give the same loss and gradient from the same seed."""
    results = []
    for code in (before, after):
        loss = published_losses.as_loss(code)
        draw = torch.Generator().manual_seed(1)
        references = torch.rand(50, *shape, generator=draw) * 2 - 1
        weight = torch.tensor(0.7, requires_grad=True)

        def net(x, level, weight=weight, field="field_fn" in after):
            wide = level.view(-1, 1, 1, 1)
            output = weight * x / (1 + wide)
            return (output, -weight * level / (1 + level)) if field else output

        torch.manual_seed(0)
        value = loss(net, references[:20], references)
        value.backward()
        results.append(torch.stack([value.detach(), weight.grad]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=0)


def test_a_published_loss_in_one_call(in_float64):
    """flow.loss draws the noise in the order in which the published losses do."""
    references = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    flows = [
        (pfgm.PoissonFlow((3, 8, 8), M=291), lambda x, z: (x / (1 + z.view(-1, 1, 1, 1)), -z)),
        (pfgm.PoissonFlowPP((3, 8, 8), D=float("inf")), lambda x, sigma: 0.7 * x),
    ]
    for (flow, net), (code, _) in zip(flows, LOSSES.values(), strict=False):
        torch.manual_seed(0)
        before = published_losses.as_loss(code)(net, references[:20], references)
        torch.manual_seed(0)
        torch.testing.assert_close(
            flow.loss(net, references[:20], references), before, rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "index.md"], ids=name)
def test_first_commands_run_in_the_environment_that_they_make(page):
    """Nothing has put `.venv/bin` on the search path of a reader of these two pages."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^ {4}(\S.*)$", text, flags=re.MULTILINE)
    commands = [command for line in lines for command in line.split(" && ")]
    assert len(commands) > 2
    for command in commands:
        assert command.startswith((".venv/bin/", "python3 -m venv .venv")), command
    assert not re.findall(r"(?<![/\w])(?:pip install|mkdocs serve)[^`]*`", text)


COMMANDS = [
    (name(page), command)
    for page in PAGES
    for line in re.findall(r"^ {4,}(\S.*)$", page.read_text().replace("\\\n", ""), flags=re.M)
    for command in re.findall(r"(?:^|[ /])pfgm ((?:train|sample|evaluate) .*?)(?: &&| +#|$)", line)
]


def test_commands_of_pages_have_what_they_require():
    """A recipe or a run that `--config` names is not there to be read."""
    assert len(COMMANDS) > 30
    for page, command in COMMANDS:
        if "--config" not in command and "--resume" not in command:
            parsed = cli._parse(shlex.split(command))
            assert type(parsed).__name__.lower() == command.split()[0], page


def text_without_code(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page):
    """The anchors that mkdocs makes of the headings."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    text = text_without_code(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_public_names_are_in_the_reference():
    shown = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    described = set(re.findall(r"^::: (\S+)$", shown, flags=re.MULTILINE))
    assert {f"pfgm.{public}" for public in pfgm.__all__} <= described


def test_members_of_modules_are_in_the_reference():
    """A page that lists members of a module leaves out nothing public."""
    shown = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    for module in (pfgm.plotting, pfgm.solvers, pfgm.training, pfgm.networks):
        chosen = re.search(rf"^::: {module.__name__}\n    options:\n((?: +.*\n)*)", shown, re.M)
        for public in module.__all__ if chosen else ():
            if callable(getattr(module, public)):
                assert re.search(rf"\b{public}\b", chosen[1]), public


def test_every_page_is_in_the_navigation():
    lines = (ROOT / "mkdocs.yml").read_text().splitlines()
    start = lines.index("nav:") + 1
    end = next(i for i in range(start, len(lines)) if re.match(r"\S", lines[i]))
    listed = [m[1] for line in lines[start:end] if (m := re.search(r": +(\S+\.md)$", line))]
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES[1:])


def stored(name, column=None):
    """The rows of a result, or those with a value in a column."""
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["result"]
    return [row for row in rows if column is None or column in row]


def means(path, **chosen):
    """The one row of a table of docs/claims with these values."""
    with (DOCS / "claims" / path).open() as file:
        rows = [row for row in csv.DictReader(file) if chosen.items() <= row.items()]
    assert len(rows) == 1, chosen
    return rows[0]


def distances(row):
    return tuple(float(row[f"frechet_{space}"]) for space in ("pixels", "features"))


def span(values, digits):
    """The least and the most of values, as README writes them."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def figures_of_readme():
    """Phrases of README with figures, made from stored results."""
    pfgm_loss = stored("published_losses", "loss")[0]
    steps = {r["network"]: r["times as long"] for r in stored("published_losses", "network")}
    yield f"The training target alone takes 1/{pfgm_loss['times as long']:.0f} of"
    yield f"is {steps['MLP']:.0f} times as fast with an MLP and {steps['U-Net']:.1f} times"
    sampled = {
        each["sampler"]: each["features"]
        for each in flow_matching.means(stored("flow_matching"))
        if each["data"] == "digits"
    }
    ours, euler = sampled["multistep 10"], sampled["euler 10"]
    yield f"Fréchet distance of {ours:.1f} in features, those of Euler's method {euler:.1f} (means"


def at_its_rate(data, flow, steps, evaluations="10"):
    """The figures of a flow at its best rate, one for each seed."""
    rows = stored("flows")
    rate = flows.best_rate(rows, data, flow, steps)
    chosen = {"data": data, "flow": flow, "steps": steps, "rate": rate}
    return [row[evaluations] for row in rows if chosen.items() <= row.items()]


def features_of(data, flow, steps):
    """The distances in features of these figures, as pages write them."""
    return [f"{at['features']:.1f}" for at in at_its_rate(data, flow, steps)]


def figures_of_the_choice():
    """Phrases of the page on the choice of a flow, likewise."""
    table = "fashion-mnist/quality-means.csv"
    at = {
        (method, count): distances(
            means(
                table,
                method=method,
                sampler="multistep, log",
                evaluations=count,
                series=f"{method}, multistep, log",
            )
        )
        for method in ("PFGM balanced", "PFGM++ 128", "EDM")
        for count in ("5", "8", "10")
    }
    pfgm_5, other_5 = at["PFGM balanced", "5"], at["PFGM++ 128", "5"]
    yield f"PFGM has {pfgm_5[0]:.1f} in pixels and {pfgm_5[1]:.1f} in features"
    yield f"PFGM++ 128 has {other_5[0]:.1f} in pixels and {other_5[1]:.1f} in features"
    yield f"PFGM {at['PFGM balanced', '8'][1]:.1f}, PFGM++ 128 {at['PFGM++ 128', '8'][1]:.1f}"
    ten = {method: at[method, "10"] for method in ("PFGM balanced", "PFGM++ 128", "EDM")}
    ours, plusplus, edm = (ten[method][1] for method in ("PFGM balanced", "PFGM++ 128", "EDM"))
    yield f"PFGM++ 128 has {plusplus:.1f}, EDM {edm:.1f}, PFGM {ours:.1f}"
    pixels = [ten[method][0] for method in ("PFGM balanced", "PFGM++ 128")]
    yield "PFGM is first with {:.1f}, PFGM++ 128 has {:.1f}".format(*pixels)

    few, many = "mnist-5k", "fashion-mnist"
    ours, plusplus, edm = (" and ".join(features_of(many, f, 1000)) for f in flows.FLOWS[:3])
    yield f"PFGM++ 128 has {plusplus} (two seeds), EDM {edm}, PFGM {ours}"
    best = select(stored("budget"), data="fashion-mnist", minutes=3.0, changes={})
    best = [row for row in best if row["size"] == [48, [1, 2, 2], 2, 32]]
    ours, plusplus, edm = (
        " and ".join(f"{row['features']:.2f}" for row in select(best, flow=flow))
        for flow in flows.FLOWS[:3]
    )
    yield f"PFGM++ 128 has {plusplus} (two seeds), EDM {edm}, PFGM {ours} (one)"
    ours, plusplus = (" and ".join(features_of(few, f, 1000)) for f in flows.FLOWS[:2])
    yield f"PFGM has {ours} in features, PFGM++ 128 has {plusplus}"
    ours, plusplus = (
        " and ".join(f"{at['agreement']:.0%}" for at in at_its_rate(few, flow, 1000))
        for flow in flows.FLOWS[:2]
    )
    shown = f"of PFGM's samples {ours} show their label, of PFGM++ 128's {plusplus}"
    yield shown.replace("%", " %")
    labelled = {
        each["method"]: each for each in weighting.means(stored("weighting")) if "agreement" in each
    }
    ours, plusplus = (labelled[name]["agreement"] for name in ("PFGM, balanced", "PFGM++ 128"))
    yield f"{100 * ours:.0f} % of PFGM's and {100 * plusplus:.0f} % of PFGM++ 128's"
    ours, plusplus = (" and ".join(features_of(few, f, 4000)) for f in flows.FLOWS[:2])
    yield f"PFGM has {ours} (two seeds), PFGM++ 128 has {plusplus}"

    table = "dimensions-means.csv"
    bits = {D: distances(means(table, D=D, error="bits", size="3")) for D in ("16", "64", "128")}
    edm = distances(means(table, D="inf", error="bits", size="3"))
    pixels, features = zip(*bits.values(), strict=True)
    yield f"{span(pixels, 1)} in pixels with D = 16 to 128, {edm[0]:.1f} with D = ∞"
    yield f"in features {span(features, 0)} with D = 16 to 128, {edm[1]:.0f} with D = ∞"
    plain = [means(table, D=D, error="none") for D in ("64", "128", "2048", "inf")]
    yield f"{span([distances(row)[0] for row in plain], 2)} in pixels"
    likelihood = {
        model: float(means("likelihood-means.csv", model=model, data="held out")["bits_per_dim"])
        for model in ("PFGM", "EDM")
    }
    yield f"EDM has {likelihood['EDM']:.2f}, PFGM {likelihood['PFGM']:.2f}"


@pytest.mark.parametrize(
    ("page", "figures"),
    [(ROOT / "README.md", figures_of_readme), (DOCS / "which-flow.md", figures_of_the_choice)],
    ids=["README", "which-flow"],
)
def test_figures_of_a_first_page_are_stored_results(page, figures):
    prose = re.sub(r"^    .*$", "", text_without_code(page), flags=re.MULTILINE)  # no commands
    text = " ".join(prose.split())
    for phrase in figures():
        assert phrase in text, phrase
        text = text.replace(phrase, " ")
    text = re.sub(r"\]\([^)]*\)|<img[^>]*>|Python 3\.10|Apache-2\.0|CC BY 4\.0|CC0 1\.0", " ", text)
    assert not re.findall(r"\d+\.\d+|\d+ %|\d+ times", text)


def test_the_published_losses_of_the_page_are_stored():
    page = (DOCS / "benchmarks.md").read_text()
    for row in stored("published_losses", "loss"):
        cells = (
            f"{1e3 * row['seconds before']:.0f} ms",
            f"{1e3 * row['seconds after']:.1f} ms",
            f"{row['times as long']:.0f}",
            f"{row['relative difference']:.1e}".replace("e-0", "e-"),
            str(row["lines of the target before"]),
        )
        assert f"| {' | '.join(cells)} |" in page
    for row in stored("published_losses", "network"):
        cells = (
            row["network"],
            f"{1e3 * row['seconds before']:.0f} ms",
            f"{1e3 * row['seconds after']:.0f} ms",
            f"{row['times as long']:.1f}",
        )
        assert f"| {' | '.join(cells)} |" in page


def drawing_command(page, written):
    """The command of a page that writes a picture from a network of the package."""
    names = "|".join(pfgm.pretrained.PRETRAINED)
    pattern = rf"pfgm (sample (?:{names}) .*{re.escape(written)})$"
    (command,) = re.findall(pattern, page.read_text(), flags=re.MULTILINE)
    return command


def check_picture(written, picture):
    """The same within 2 levels in 99 % of the pixels, and small enough for a first page."""
    most = 1_000_000 if picture.endswith(".gif") else 300_000
    assert (DOCS / "images" / picture).stat().st_size < most
    image = pytest.importorskip("PIL.Image")
    with image.open(written) as drawn, image.open(DOCS / "images" / picture) as shown:
        frames = getattr(shown, "n_frames", 1)
        assert getattr(drawn, "n_frames", 1) == frames
        for frame in range(frames):
            drawn.seek(frame)
            shown.seek(frame)
            a, b = (np.asarray(each.convert("RGB")).astype(int) for each in (drawn, shown))
            assert a.shape == b.shape
            assert (np.abs(a - b).max(2) <= 2).mean() >= 0.99


@pytest.mark.parametrize(
    ("page", "written", "picture"),
    [
        ("README.md", "samples.png", "avatars.png"),
        ("README.md", "avatars.gif", "avatars.gif"),
        ("docs/howto/pretrained.md", "samples.png", "fashion-mnist.png"),
        ("docs/howto/pretrained.md", "clothes.gif", "fashion-mnist.gif"),
    ],
)
def test_commands_draw_the_pictures_of_their_page(tmp_path, monkeypatch, page, written, picture):
    assert f"images/{picture}" in (ROOT / page).read_text()
    monkeypatch.chdir(tmp_path)
    assert cli.main(drawing_command(ROOT / page, written).split()) == 0
    check_picture(written, picture)


def test_the_code_of_editing_draws_its_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(blocks(DOCS / "howto" / "editing.md")[-1], {})
    check_picture("between.png", "avatars-between.png")
    check_picture("completed.png", "avatars-completed.png")


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/howto/pretrained.md"])
def test_the_designers_of_avatars_are_beside_the_pictures(page):
    text = " ".join((ROOT / page).read_text().split())
    assert "generated avatars" in text
    credits = (ROOT / "pfgm" / "pretrained" / "CREDITS.md").read_text()
    designers = re.findall(
        r"^\| [\w-]+ \| \[.*?\]\(.*?\) \| \[(.*?)\]", credits, flags=re.MULTILINE
    )
    assert len(designers) == 10
    for name in [*designers, "DiceBear", "CC BY 4.0", "CC0 1.0"]:
        assert name in text, name


def test_the_tables_of_flows_have_the_stored_figures():
    page = (DOCS / "studies.md").read_text()
    tables, cells = {}, {}
    for row in stored("flows"):
        at = row["10"]
        cell = f"{at['features']:.1f}, {at['agreement']:.0%}".replace("%", " %")
        if row["steps"] == 1000 and row["seed"] == 0:
            tables.setdefault((row["data"], row["flow"]), {})[row["rate"]] = cell
        if row["flow"] in flows.FLOWS and at in at_its_rate(row["data"], row["flow"], row["steps"]):
            cells.setdefault((row["data"], row["steps"]), {}).setdefault(row["flow"], []).append(
                cell
            )
    for (_, flow), by_rate in tables.items():
        assert f"| {' | '.join([flow, *(by_rate[rate] for rate in flows.RATES)])} |" in page
    assert len(cells) == 7
    for (data, steps), by_flow in cells.items():
        name = data.replace("mnist", "MNIST").replace("fashion", "Fashion")
        row = ["; ".join(by_flow.get(flow, ["–"])) for flow in flows.FLOWS]
        assert f"| {name}, {steps} | {' | '.join(row)} |" in page


def test_the_table_of_the_weights_of_levels_has_the_stored_figures():
    page, right = (DOCS / "studies.md").read_text(), {}
    for row in weighting.means(stored("weighting")):
        cells = [row["method"], "yes" if row["labels"] else "no"]
        for figure in ("agreement", "agreement_guided", "frechet_distance", "precision", "recall"):
            cells.append(
                f"{row[figure]:.2f} ({row[f'{figure}_spread']:.2f})" if figure in row else ""
            )
        assert f"| {' | '.join(cells)} |" in page
        if row["labels"]:
            right[row["method"]] = f"{100 * row['agreement']:.0f} %"
    training = " ".join((DOCS / "howto" / "training.md").read_text().split())
    assert f"{right['PFGM, balanced']} of its samples then show the label" in training
    assert f"{right['PFGM, published']} with the published loss" in training


def test_pfgm_leads_with_five_evaluations_after_a_thousand_steps():
    page = " ".join((DOCS / "studies.md").read_text().split())
    for data in flows.DATA:
        of = {
            flow: [at["features"] for at in at_its_rate(data, flow, 1000, "5")]
            for flow in flows.FLOWS
        }
        assert all(min(each) == each[0] for each in zip(*of.values(), strict=True))
        for flow in flows.FLOWS[:2]:
            assert " and ".join(f"{value:.1f}" for value in of[flow]) in page


def test_the_tables_of_samples_have_the_stored_figures():
    pages = {
        "avatars": ("pretrained.md", 2, 2),
        "digits": ("sampling.md", 3, 1),
        "fashion-mnist": ("pretrained.md", 1, 2),
    }
    notes = {0: "", 10: "", 20: " (20 evaluations)"}
    for row in stored("pretrained", "evaluations"):
        name, *digits = pages[row["network"]]
        run = row["run"].replace("log to", "`log` to") + notes[row["evaluations"]]
        cells = ["labels (schedule `rho`, the default)" if run == "labels" else run]
        for space, places in zip(("pixels", "features"), digits, strict=True):
            cells.append(f"{row[f'frechet_distance_{space}']:.{places}f}")
            cells += [f"{row[f'{each}_{space}']:.2f}" for each in ("precision", "recall")]
        assert f"| {' | '.join(cells)} |" in (DOCS / "howto" / name).read_text(), row
    page = (DOCS / "howto" / "sampling.md").read_text()
    few, more, multistep = (
        distances(means("quality-means.csv", series=f"PFGM++ 128, {sampler}, rho", setting=setting))
        for sampler, setting in (("heun", "10"), ("heun", "20"), ("multistep", "10"))
    )
    text = " ".join(page.split())
    assert f"`heun` is {few[0]:.1f} at 9 evaluations and {more[0]:.2f} at 19" in text
    assert f"with `multistep` it is {multistep[0]:.2f} at 10" in text


def test_the_page_of_avatars_has_the_stored_figures():
    page = " ".join((DOCS / "howto" / "pretrained.md").read_text().split())
    rows = {row["run"]: row for row in stored("pretrained", "label_right")}
    shown, held_out = rows[pretrained.SHOWN], rows[pretrained.HELD_OUT]
    for name in ("median_distance", "least_distance"):
        assert (
            f"{shown[name]:.3f} for samples and {held_out[name]:.3f} for held-out avatars" in page
        )
    for name in ("label_right", "label_of_nearest_right"):
        values = f"{shown[name]:.1%} of the samples and {held_out[name]:.1%} of".replace("%", " %")
        assert values in page


def test_the_table_of_minutes_has_the_stored_figures():
    page = (DOCS / "studies.md").read_text()
    training = " ".join((DOCS / "howto" / "training.md").read_text().split())
    for row in (rows := stored("budget")):
        end = f"{row['features']:.2f} | {100 * row['agreement']:.0f} % |"
        minutes = f"{row['minutes']:g}" if row["minutes"] else ""
        assert f"| {minutes} | {end}" in page
    of_command = [row for row in rows if row["flow"] == budget.COMMAND and not row["size"]]
    five, twenty, digits = (f"{row['features']:.2f}" for row in of_command)
    assert f"of {five} in [features]" in training
    assert f"after 5 minutes and {twenty} after 20" in training
    assert f"of MNIST it is {digits} after 5 minutes" in training


def test_the_page_of_other_libraries_has_the_stored_figures():
    page = (DOCS / "howto" / "ecosystem.md").read_text()
    rows = stored("flow_matching")
    means = {(each["data"], each["sampler"]): each for each in flow_matching.means(rows)}
    ways = {"euler": "Euler's method", "multistep": "`as_denoiser`, `multistep`"}
    for (data, name), (way, title) in itertools.product(
        {"digits": "digits", "fashion-mnist": "Fashion-MNIST"}.items(), ways.items()
    ):
        cells = [f"{name}, {title}"]
        for count in flow_matching.EVALUATIONS:
            each = means[data, f"{way} {count}"]
            cells.append(f"{each['features']:.1f} ({each['features_spread']:.1f})")
        assert f"| {' | '.join(cells)} |" in page
    assert all(row["multistep 10"]["features"] < row["euler 20"]["features"] for row in rows)


def with_spaces(number):
    return f"{number:,}".replace(",", " ") if number >= 10_000 else str(number)


def tables_of_scaling():
    """The rows of the tables of the page on scaling."""
    for row in stored("scaling", "rows"):
        seconds = [f"{row[name]:.2f} s" for name in ("memory", "file", "statistics")]
        batches = [f"{1e3 * row[name]:.1f} ms" for name in ("first batch", "batch")]
        sizes = [with_spaces(row[name]) for name in ("rows", "values", "points")]
        ratio, peak = f"{row['file / memory, a row']:.2f}", f"{row['peak MiB']:.0f} MiB"
        yield [*sizes, *seconds[:2], ratio, peak, seconds[2], *batches]
    for row in (rows := stored("scaling", "processes")):
        cells = [str(row["processes"]), f"{row['MiB of rows']:.1f} MiB"]
        cells.append(f"{row['field']['peak MiB']:.0f} MiB")
        for name in scaling.OPERATIONS:
            each, of_all = row[name]["processor"], row[f"{name} in all, processor"]
            cells += [f"{1e3 * each:.0f} ms", f"{1e3 * of_all:.0f} ms"]
        yield cells
    for row, name in itertools.product(rows[1:], scaling.OPERATIONS):
        given = row[name]["bytes given"]
        sent = scaling.bytes_sent(given, row["processes"])
        counts = (*given.values(), round(sent), round(row[name]["bytes sent"]))
        yield [str(row["processes"]), name, *map(with_spaces, counts)]


def imagenet_64():
    """The rows of the table that is calculated, for 1 281 167 images in 8 processes."""
    M, N, B, P, R = 1_281_167, 3 * 64**2, 2048, 8, 4096
    given = scaling.bytes_given(B, N, P, "field")
    gathered, reduced, sent = (
        f"{each / 1e6:.1f} MB" for each in (*given.values(), scaling.bytes_sent(given, P))
    )
    (largest,) = [row for row in stored("scaling", "rows") if row["values"] == 3072]
    value = largest["statistics"] / (largest["rows"] * largest["values"])
    yield "the data, as bytes", f"{M * N / 1e9:.1f} GB", f"{M * N / P / 1e9:.2f} GB"
    yield "order of an epoch", f"{24 * M / 1e6:.0f} MB", f"{24 * M / P / 1e6:.1f} MB"
    yield "reading its reference batch, each step", f"{R * N / 1e6:.0f} MB", "nothing"
    few, over_all = (with_spaces(round(4 * B // P * rows * N / 1e9)) for rows in (R, M))
    yield "arithmetic of the target, 4 operations a value", f"{few} billion", f"{over_all} billion"
    yield "given to all_gather and all_reduce", "nothing", f"{gathered} and {reduced}"
    yield "sent for the target", "nothing", sent
    gradients = f"{8 * 300e6 * (P - 1) / P / 1e9:.1f} GB"
    yield "sent for the gradients of 300 million parameters", gradients, gradients
    yield (
        f"statistics, once, at {1e9 * value:.0f} ns a value on one thread",
        f"{value * M * N:.0f} s",
        f"{value * M * N / P:.0f} s",
    )


def test_the_page_of_scaling_has_the_stored_figures():
    page = (DOCS / "howto" / "scaling.md").read_text()
    tables = [*tables_of_scaling(), *imagenet_64()]
    assert len(tables) == 6 + 3 + 4 + 8
    for cells in tables:
        assert f"| {' | '.join(cells)} |" in page
    text = " ".join(page.split())
    rows = {(row["rows"], row["values"], row["points"]): row for row in stored("scaling", "rows")}
    middle = rows[100_000, 768, 64]
    for name, source in (("memory", "memory"), ("file", "the file")):
        more_values = (
            rows[100_000, 3072, 64][name] / middle[name],
            middle[name] / rows[100_000, 192, 64][name],
        )
        more_points = rows[100_000, 768, 256][name] / middle[name]
        assert (
            f"{min(more_values):.1f} and {max(more_values):.1f} times as long from {source}" in text
        )
        assert f"{more_points:.1f} times from {source}" in text
    ratios = [row["file / memory, a row"] for row in rows.values()]
    assert f"{min(ratios):.1f} to {max(ratios):.1f} times" in text
    two, four = (row for row in stored("scaling", "processes") if row["processes"] > 1)
    for row, words in ((two, "a process of two"), (four, "one of four")):
        times = " and ".join(
            f"{row[name]['one process / this, processor']:.1f}" for name in scaling.OPERATIONS
        )
        assert f"{words} takes 1/{times.replace(' and ', ' and 1/')}" in text
    assert f"{1_281_167 / 4096:.0f} times the arithmetic" in text


def test_the_page_of_editing_has_the_stored_figures():
    page = (DOCS / "howto" / "editing.md").read_text()
    for row in stored("completions"):
        if row["network"] == "fashion-mnist":
            rounds, evaluations = row["rounds"], f" {row['evaluations']}"
            if rounds is None:
                rounds, evaluations = "the images themselves", ""
            figures = f"{row['seam']:.2f} | {row['frechet_distance_features']:.2f}"
            assert f"| {rounds} |{evaluations} | {figures} |" in page


def test_the_page_of_plusplus_has_the_stored_figures():
    one, four = (distances(means("dimensions-means.csv", D=D, error="none")) for D in "14")
    expected = f"is {one[0]:.2f} at D = 1 and {four[0]:.2f} at D = 4, in features {one[1]:.1f} and"
    text = " ".join((DOCS / "howto" / "plusplus.md").read_text().split())
    assert f"{expected} {four[1]:.1f} (" in text


def test_quick_start_has_the_stored_figures():
    start = (DOCS / "index.md").read_text()
    first = stored("demo")[0]
    assert first["seed"] == 0
    for name, figures in (
        ("Fréchet distance in pixel space", first["frechet_distance"]),
        ("precision, k = 3", first["precision"]),
        ("recall, k = 3", first["recall"]),
    ):
        assert f"| {name} | {figures['samples']:.2f} | {figures['train']:.2f} |" in start

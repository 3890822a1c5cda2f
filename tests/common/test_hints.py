"""Arguments that go by other names elsewhere: what to give instead."""

import inspect

import pytest
import torch

import pfgm
from pfgm import cli
from pfgm.flows.sampling import SampleOptions
from pfgm.training import TrainConfig, Trainer
from pfgm.training.runs import RunConfig

FLOW, PLUS = pfgm.PoissonFlow((2,), data_norm=1.0), pfgm.PoissonFlowPP((2,), D=64)
DATA = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: TrainConfig(lr=1e-3), "argument 'lr'; use learning_rate"),
        (lambda: TrainConfig(num_steps=3), "'num_steps'; use steps"),
        (lambda: TrainConfig(batch=3), "'batch'; use batch_size"),
        (lambda: TrainConfig(references=3), "'references'; use reference_batch"),
        (lambda: TrainConfig(colour=3), "'colour'$"),
        *(
            (
                lambda given=given: Trainer(FLOW, None, DATA, **given),
                f"use config=TrainConfig.{name}",
            )
            for given, name in (
                ({"steps": 3}, "steps"),
                ({"lr": 3}, "learning_rate"),
                ({"epochs": 3}, "steps"),
                ({"batch_size": 3}, "batch_size"),
            )
        ),
        (lambda: FLOW.grid(n_steps=3), "'n_steps'; use steps"),
        (lambda: FLOW.fit_levels(DATA, T=3), "'T'; use steps"),
        *(
            (lambda flow=flow, given=given: flow.sample(flow.empirical(DATA), 2, **given), hint)
            for flow in (FLOW, PLUS)
            for given, hint in (
                ({"num_steps": 3}, "'num_steps'; its options are: none; use steps"),
                ({"seed": 3}, "use generator=torch.Generator"),
                ({"labels": DATA}, "use condition={'labels': labels}"),
                ({"guidance_scale": 2}, "use guidance"),
            )
        ),
    ],
)
def test_functions_say_what_to_give_instead(call, hint):
    with pytest.raises(TypeError, match=hint):
        call()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "--lr", "3"], "there is no option --lr; use --learning-rate"),
        (["train", "--image-size", "32"], "there is no option --image-size; use --resize"),
        (["train", "--train_batch_size", "32"], "use --batch-size"),
        (["train", "--output_dir=x"], "use --out"),
        (["sample", "--num-steps", "3"], "--num-steps; use --steps"),
        (["sample", "--batch", "3"], "--batch; use --batch-size"),
        *(
            (["train", f"--{name}", "3"], f"no option --{name}; use --{instead}.")
            for name, instead in {
                # of torchcfm's and diffusers' scripts
                **{"total_steps": "steps", "num_channel": "width"},
                **{"save_step": "checkpoint-every", "grad_clip": "clip", "ema_decay": "ema"},
                **{"num_epochs": "steps", "num_train_epochs": "steps", "resolution": "resize"},
                **{"eval_batch_size": "batch-size", "lr_scheduler": "decay", "logger": "log"},
                **{"lr_warmup_steps": "warmup", "mixed_precision": "precision"},
                **{"save_model_epochs": "checkpoint-every", "adam_beta2": "beta2"},
                **{"save_images_epochs": "evaluate-every", "report_to": "log"},
                **{"checkpointing_steps": "checkpoint-every", "dataset_name": "data"},
            }.items()
        ),
        *(
            (["sample", f"--{name}", "3"], f"no option --{name}; use --{instead}.")
            for name, instead in {
                **{"num_gen": "n", "integration_steps": "steps", "integration_method": "solver"},
                **{"mixed_precision": "compute", "precision": "compute", "outdir": "out"},
                **{"class": "label", "num_inference_steps": "steps"},
            }.items()
        ),
        (["demo", "--T", "3"], "--T; use --steps"),
    ],
)
def test_commands_say_what_to_give_instead(arguments, hint, capsys):
    assert cli.main(arguments) == 2
    assert hint in capsys.readouterr().err


def test_recipes_say_what_to_give_instead(tmp_path):
    (tmp_path / "recipe.json").write_text('{"training": {"lr": 1e-3}}')
    with pytest.raises(ValueError, match=r"no setting 'lr'; .*; use learning_rate"):
        RunConfig.load(tmp_path / "recipe.json")


def test_the_options_of_both_flows_have_the_types_of_sample():
    own = inspect.signature(pfgm.PoissonFlow.sample).parameters
    named = {name for name, each in own.items() if each.kind is each.KEYWORD_ONLY}
    others = {"rtol", "atol", "project", "churn", "churn_range", "churn_noise"}
    assert {*SampleOptions.__annotations__} == (named - {"return_nfe"}) | others
    assert pfgm.PoissonFlowPP.sample is pfgm.PoissonFlow.sample

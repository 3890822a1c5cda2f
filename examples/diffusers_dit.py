"""Trains the DiTTransformer2DModel of diffusers as the network of a Poisson flow, with labels.

    python examples/diffusers_dit.py --out dit [--quick]

The labels of the flow are the class_labels of the DiT, and its label 10 means no label. In training
the DiT drops a tenth of the labels by itself, which guidance needs. Each column of the picture has
one label. The training loop is that of plain_trainer.py.
"""

import torch
from diffusers import DiTTransformer2DModel
from plain_trainer import parse_options, train
from torch import Tensor

import pfgm
from pfgm.common.files import check_folder
from pfgm.plotting import image_grid

if __name__ == "__main__":
    options = parse_options(__doc__)
    torch.manual_seed(0)
    digits = pfgm.data.digits()
    data, labels = digits.train, digits.train_labels
    flow = pfgm.PoissonFlow.from_data(data)
    dit = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=1,
        num_layers=4,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    net = flow.network(dit, conditions={"labels": "class_labels"}, no_label=10)

    def batch_loss() -> Tensor:
        rows = torch.randint(len(data), (64,))
        condition = {"labels": labels[rows]}
        return flow.loss(net, data[rows], data, condition=condition, reference_labels=labels)

    adam = torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.99))
    averaged = train(net, adam, batch_loss, steps=20 if options.quick else 3000)
    columns = {"labels": torch.arange(10).repeat(10)}
    samples = flow.sample(averaged, 100, condition=columns, guidance=1.5)
    image_grid(samples, check_folder(options.out) / "diffusers_dit.png", columns=10)

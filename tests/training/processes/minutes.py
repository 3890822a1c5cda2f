"""Trains for a second in several processes, with evaluations: python minutes.py FOLDER"""

import sys

import torch

import pfgm
from pfgm.training import TrainConfig, Trainer
from pfgm.training.processes import Processes, joined

if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined(torch.device("cpu"), timeout=30):
        data = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        flow = pfgm.PoissonFlow.from_data(data)
        net, steps = flow.network("mlp", width=8), []
        config = TrainConfig(minutes=0.02, batch_size=16)
        Trainer(
            flow,
            net,
            data,
            config,
            folder=sys.argv[1],
            progress=False,
            evaluate=lambda step, network: steps.append(step) or {"figure": 0.5},
        ).train()
        rank, count = Processes().rank, len(steps)
        print(f"rank {rank} trained for minutes with {count} evaluations")

"""Trains in several processes: python training.py FOLDER DATA (shared | whole) STEPS [DIES_AT]."""

import os
import sys
import time

import torch
import torch.distributed as dist

import pfgm
from pfgm.training import TrainConfig, Trainer
from pfgm.training.processes import joined

folder, data, kind, steps, *dies_at = sys.argv[1:]


class Mortal(pfgm.networks.MLP):
    """Kills its own process at one step of rank 1."""

    calls = 0

    def forward(self, x, z, labels=None):
        self.calls += 1
        if dies_at and self.calls == int(dies_at[0]):
            os.environ["RANK"] == "1" and os._exit(9)
            time.sleep(0.1)
        return super().forward(x, z, labels)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined(torch.device("cpu"), timeout=30):
        rows = pfgm.ReferenceSet(data)
        if kind == "shared":
            rows = rows.shard()
        flow = pfgm.PoissonFlow.from_data(rows)
        torch.manual_seed(dist.get_rank())  # the weights of the first process are used
        network = flow.network(Mortal, width=16, depth=1)
        config = TrainConfig(
            steps=int(steps), batch_size=16, reference_batch=64, warmup=4, learning_rate=1e-3,
            checkpoint_every=10, log_every=5,
        )  # fmt: skip
        trainer = Trainer(flow, network, rows, config, folder=folder, progress=False)
        if os.path.exists(os.path.join(folder, "latest.json")):
            trainer.resume()
        trainer.train()
        weights = torch.cat([p.flatten() for p in network.parameters()]).detach()
        gathered = [torch.empty_like(weights) for _ in range(2)]
        dist.all_gather(gathered, weights)
        assert torch.equal(*gathered)
        print(f"rank {dist.get_rank()} at step {trainer.step} with {kind} references")

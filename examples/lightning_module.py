"""Trains a Poisson flow in a Lightning module; pfgm.field_fn computes the target.

python examples/lightning_module.py --out lightning [--quick]
"""

import argparse

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.utils.data import DataLoader, TensorDataset

import pfgm
from pfgm.common.files import check_folder
from pfgm.plotting import image_grid


class PoissonModule(lightning.LightningModule):
    references: torch.Tensor

    def __init__(self, flow: pfgm.PoissonFlow, references: torch.Tensor) -> None:
        super().__init__()
        self.flow, self.net = flow, flow.network("unet")
        self.register_buffer("references", references, persistent=False)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x_perturbed, z = self.flow.perturb(batch[0])
        field_x, field_z = pfgm.field_fn(x_perturbed, z, self.references, gamma=self.flow.gamma)
        predicted_x, predicted_z = self.net(x_perturbed, z)
        error_x = (predicted_x - field_x).square().flatten(1).sum(1)
        loss: torch.Tensor = (error_x + (predicted_z - field_z).square()).mean() / 2
        if self.global_step % (self.trainer.max_steps // 10) == 0:
            self.print(f"step {self.global_step}: loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="few steps, a few seconds")
    options = parser.parse_args()
    lightning.seed_everything(0)
    data = pfgm.data.digits().train
    module = PoissonModule(pfgm.PoissonFlow.from_data(data), references=data)
    trainer = lightning.Trainer(
        max_steps=30 if options.quick else 4000,
        callbacks=[EMAWeightAveraging(decay=0.99)],  # averages the weights
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(data), batch_size=64, shuffle=True))
    samples = module.flow.sample(module.net, 100)
    image_grid(samples, check_folder(options.out) / "lightning_module.png")

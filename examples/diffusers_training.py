"""Trains as diffusers' train_unconditional.py does, with a Poisson flow of any D.

    python examples/diffusers_training.py --out pipeline [--quick]

In place of drawing normal noise, scheduler.perturb draws the noise of the flow and its timesteps.
The pipeline is saved, and loaded again to draw the picture.
"""

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from diffusers_unet import digits_unet
from plain_trainer import parse_options
from torch.utils.data import DataLoader, TensorDataset

import pfgm
from pfgm.common.files import check_folder
from pfgm.integrations.diffusers import PoissonFlowPipeline, PoissonFlowPPScheduler
from pfgm.plotting import image_grid

if __name__ == "__main__":
    options = parse_options(__doc__)
    torch.manual_seed(0)
    accelerator = Accelerator()
    data = pfgm.data.digits().train
    unet = digits_unet()
    averages = EMAModel(unet.parameters(), use_ema_warmup=True, power=3 / 4)
    flow = pfgm.PoissonFlowPP.from_data(data, D=128)
    scheduler = PoissonFlowPPScheduler.from_flow(flow)
    batches = DataLoader(TensorDataset(data), batch_size=64, shuffle=True)
    epochs = 2 if options.quick else 100
    adam = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    unet, adam, batches = accelerator.prepare(unet, adam, batches)
    for epoch in range(epochs):
        losses = []
        for (clean,) in batches:
            noisy, t = scheduler.perturb(clean)
            output = unet(scheduler.scale_model_input(noisy, t), t).sample
            loss = (output - scheduler.target(noisy, t, clean)).square().mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
            averages.step(unet.parameters())
            losses.append(loss.item())
        accelerator.print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}")
    averages.copy_to(unet.parameters())
    folder = check_folder(options.out)
    PoissonFlowPipeline(accelerator.unwrap_model(unet), scheduler).save_pretrained(folder)
    images = PoissonFlowPipeline.from_pretrained(folder)(100, output_type="pt").images
    image_grid(2 * images - 1, folder / "diffusers_training.png")

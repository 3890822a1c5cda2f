"""Networks of the field, (x, z) -> (field_x, field_z), and denoisers, (x, sigma) -> mean."""

from .denoiser import Denoiser
from .embedding import NoiseEmbedding
from .fields import FieldNetwork, field_from_mean
from .mlp import MLP
from .preconditioned import Preconditioned
from .published.edm_unets import EDMDenoiser, SongUNet
from .published.load import load_published
from .published.pfgm_unets import DDPMpp, NCSNpp, Published
from .registry import NETWORKS, build
from .unet import UNet

__all__ = [
    "MLP",
    "NETWORKS",
    "DDPMpp",
    "Denoiser",
    "EDMDenoiser",
    "FieldNetwork",
    "NCSNpp",
    "NoiseEmbedding",
    "Preconditioned",
    "Published",
    "SongUNet",
    "UNet",
    "build",
    "field_from_mean",
    "load_published",
]

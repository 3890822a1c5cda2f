"""How close samples are to real data, in the space of the samples or of their features.

Everything is computed in float64 on the device of the arguments. Distances that decide a result are
computed from exact differences, because dot products lose accuracy near zero, where it matters
most. Error bounds tell which they are.

The argument ``features`` of a metric is a function from (n, *S) to (n, F). None compares the
samples themselves. The function gets at most 64 samples at a time, without gradients. A module, or
the module of a bound method, is in evaluation mode during the call. With features, samples may have
any dtype that the function takes. Pixels say little about what an image shows: the features of a
:class:`Classifier` say more.

All metrics raise TypeError for samples that are not floating point, and ValueError if sample shapes
or devices differ, there are too few samples, values are NaN or infinity or so large that a result
overflows, features have another shape, or an argument is out of range.
"""

from .classifier import (
    CLASSIFIERS,
    Classifier,
    load_classifier,
    save_classifier,
    train_classifier,
)
from .distances import (
    DensityCoverage,
    KernelDistance,
    PrecisionRecall,
    density_coverage,
    frechet_distance,
    kernel_distance,
    nearest_distance,
    neighbour_distances,
    precision_recall,
)
from .inception import InceptionMetrics, inception_metrics

__all__ = [
    "CLASSIFIERS",
    "Classifier",
    "DensityCoverage",
    "InceptionMetrics",
    "KernelDistance",
    "PrecisionRecall",
    "density_coverage",
    "frechet_distance",
    "inception_metrics",
    "kernel_distance",
    "load_classifier",
    "nearest_distance",
    "neighbour_distances",
    "precision_recall",
    "save_classifier",
    "train_classifier",
]

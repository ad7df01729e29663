"""Measure what an encoder's features know of classes and of transformations of the image.

Needs kornia, scikit-learn and rich: ``pip install '.[probe]'``.
"""

try:
    import kornia  # noqa: F401
    import rich  # noqa: F401
    import sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"recon_aux.probe needs {error.name}; install it with, in a clone: pip install '.[probe]'"
    ) from error

from recon_aux.probe.linear import linear_classifier, linear_regression
from recon_aux.probe.measure import REGRESSORS, compare, probe
from recon_aux.probe.mlp import mlp_regression
from recon_aux.probe.results import (
    PartResult,
    ProbeResult,
    markdown_table,
    render,
    table,
)
from recon_aux.probe.transformations import (
    COMBINED,
    SETS,
    TRANSFORMATIONS,
    TransformationSet,
    draw_parameters,
    transform,
)

__all__ = [
    "COMBINED",
    "REGRESSORS",
    "SETS",
    "TRANSFORMATIONS",
    "PartResult",
    "ProbeResult",
    "TransformationSet",
    "compare",
    "draw_parameters",
    "linear_classifier",
    "linear_regression",
    "markdown_table",
    "mlp_regression",
    "probe",
    "render",
    "table",
    "transform",
]

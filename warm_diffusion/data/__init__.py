"""Image data: sources, memory-mapped cache, index stream, pixels in and out."""

from warm_diffusion.data.cache import Dataset, load_dataset
from warm_diffusion.data.statistics import Statistics, statistics
from warm_diffusion.data.stream import batch_indices

__all__ = ["Dataset", "Statistics", "batch_indices", "load_dataset", "statistics"]

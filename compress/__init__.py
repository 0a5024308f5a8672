"""Make trained Hugging Face language models smaller and faster without training them again.

`import compress` registers the checkpoint format with transformers, so that `from_pretrained` opens compressed models.
"""

from compress import hf  # registers the format with transformers
from compress.checkpoint import load
from compress.errors import CompressError
from compress.export import export_dense
from compress.recipe import Recipe
from compress.run import compress_model
from compress.version import __version__

__all__ = ["CompressError", "Recipe", "__version__", "compress_model", "export_dense", "hf", "load"]

"""Text <-> token ids, chat template, ids -> text piece by piece.

`from_folder` reads what a Hugging Face or MLX folder ships (`tokenizer.json` or `tokenizer.model`, and side files),
`from_gguf` builds the same from a GGUF file's metadata. Both give a `Tokenizer`. Knows nothing about models or weights.
"""

from .core import Tokenizer
from .folder import from_folder
from .gguf import from_gguf
from .streaming import StreamingDetokenizer
from .template import OPENELM_INSTRUCT_TEMPLATE

__all__ = ["OPENELM_INSTRUCT_TEMPLATE", "StreamingDetokenizer", "Tokenizer", "from_folder", "from_gguf"]

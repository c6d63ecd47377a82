"""Text ↔ token ids, chat templates, and the streaming conversion of ids to text.

`from_folder` reads the tokenizer of a Hugging Face or MLX folder (`tokenizer.json` or `tokenizer.model`, with their
side files), `from_gguf` builds it from the metadata of a GGUF file. Both return a `Tokenizer`. This package knows
nothing about models or weights.
"""

from .core import Tokenizer
from .folder import from_folder
from .gguf import from_gguf
from .streaming import StreamingDetokenizer
from .template import OPENELM_INSTRUCT_TEMPLATE

__all__ = ["OPENELM_INSTRUCT_TEMPLATE", "StreamingDetokenizer", "Tokenizer", "from_folder", "from_gguf"]

"""The compatibility test bed: writes tiny model folders and GGUF files of every kind, whose right answer is known.

    cases.py         the dimensions of a file (family, tokenizer, quantisation, …), what goes with what, and the cases
    vocabularies.py  tokenizers of every kind, as files of a folder and as GGUF metadata
    families.py      the architectures: config, and weights by which the next token is a function of the present one
    folders.py       writes a case as a folder
    gguf_files.py    writes a case as a GGUF file
    bed.py           a case → its files, its prompts, and what the right ids, text and end are
    llama_cpp.json   what llama.cpp made of the GGUF files; benchmarks/compat_llama_cpp.py records it

Everything is written by the libraries that others write such files with, or from the formats' definitions; nothing of
the package under test is used.
"""

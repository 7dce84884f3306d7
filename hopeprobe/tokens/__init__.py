"""Token streams: from a name or a path to windows of tokens that training and measuring read.

`load_tokens` turns `--data` (the `builtin` corpus, files, or a dataset of the Hugging Face hub) into
`TokenData`: one memory-mapped uint16 stream cut into documents, a tenth of them held out. `TrainWindows`
packs its training documents into shuffled windows; `EvalWindows` draws windows of single documents
round-robin, so that few tokens span many documents. `Unigram` is the baseline that needs no model. Everything
is numpy: torch, datasets and tiktoken are not imported before they are needed.
"""

from hopeprobe.tokens.document import Document, Source
from hopeprobe.tokens.sources import open_sources, read_documents
from hopeprobe.tokens.store import SPLITS, TokenData, load_tokens
from hopeprobe.tokens.tokenizer import Tokenizer, load_tokenizer
from hopeprobe.tokens.unigram import Unigram
from hopeprobe.tokens.windows import N_GROUPS, EvalBatch, EvalWindows, TrainWindows

__all__ = [
    "N_GROUPS",
    "SPLITS",
    "Document",
    "EvalBatch",
    "EvalWindows",
    "Source",
    "TokenData",
    "Tokenizer",
    "TrainWindows",
    "Unigram",
    "load_tokenizer",
    "load_tokens",
    "open_sources",
    "read_documents",
]

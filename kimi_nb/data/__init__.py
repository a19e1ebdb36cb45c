"""Text to batches of token ids; no torch."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    tinyworld="""
        Fact HELD_OUT_RELATIONS PHRASINGS World generate round_length statements world
    """,
    corpora="""
        BUILTIN DataError DataWarning Document ELSEWHERE END_OF_TEXT EXTRACTOR_VERSION HUB
        HUB_DOCUMENTS TEXT_SUFFIXES cache_dir extract_pydocs hub_reachable load_corpus parse_corpus
        read_text signature
    """,
    tokenizer="""
        ByteTokenizer CharTokenizer PairTokenizer Tokenizer build_tokenizer
    """,
    tokens="""
        Batches EvalWindows FORMAT_VERSION IGNORE SPLITS TokenData TokenDataset describe
        eval_windows overlap prepare split_documents
    """,
)

"""Text to batches of token ids; no torch."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    tinyworld="""
        Fact HELD_OUT_RELATIONS PHRASINGS World generate round_length statements world
    """,
    corpora="""
        DataError DataWarning Document ELSEWHERE END_OF_TEXT EXTRACTOR_VERSION HUB_DOCUMENTS
        ROW_SUFFIXES TEXT_SUFFIXES cache_dir extract_pydocs extract_sitedocs files_below first_line
        hub_reachable is_elastic load_corpus locked_versions parse_corpus read_text signature
        site_differences site_licences stamp
    """,
    tokenizer="""
        ByteTokenizer CharTokenizer PairTokenizer Tokenizer build_tokenizer bytes_to_unicode
    """,
    tokens="""
        BytesAt FORMAT_VERSION TokenData TokenDataset describe keep_tokens overlap prepare
        split_documents
    """,
    batches="""
        Batches EvalWindows IGNORE bytes_of eval_windows
    """,
)

"""Settings as frozen trees, errors in one line, files that are whole."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    base="""
        Config ConfigError Count Float Fraction Int KimiError Positive near parse_value
        setting_paths truth
    """,
    files="""
        ANOTHER FileError fsync write_file write_json writing
    """,
    sources="""
        BUILTIN HUB NamedFile SITE_PACKAGES SPLITS Source SourceError TOKENS exists home_path
        named_file parse_sources site_manifest tokenizer_folder
    """,
    schema="""
        AttentionConfig CLIPPED_ATTENTIONS DataConfig FFNConfig KimiConfig LINEAR_ATTENTIONS
        MOST_SEEDS MoEConfig ModelConfig NEUTRAL Needs NormConfig OptimizerConfig PLANNED PRESETS
        PositionConfig ResidualConfig RunConfig TrainConfig at_most data_identity deciding mla_sizes
        needs planned refuse_planned sleeping
    """,
    places="""
        SHIPPED brought_along is_installed place settings_path variable_set working_folder
    """,
    profile="""
        LIKE Profile load_profile profile_names
    """,
)

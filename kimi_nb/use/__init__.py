"""A trained model in the world: text, other formats, hubs."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    generate="""
        GenerateError Generator Sampling TextBuilder default_tokenizer draw keep_top_k keep_top_p
        penalise_repetition select_cache_rows
    """,
    deepseek="""
        HubError LATENT_NORM_EPS PUBLISHED config_from_deepseek_v3 deepseek_obstacles
        deepseek_settings from_deepseek_v3 model_type_of to_deepseek_v3
    """,
    hub="""
        KimiCache KimiNbConfig KimiNbForCausalLM load_pretrained model_card save_pretrained
    """,
    nanokimi="""
        ArrayDataset ModelEvaluator ProcessedDataset TextConfig TextDataProcessor Tracking
        dataset_settings from_nanokimi read_config toy_dataset track train_on
    """,
)

"""A trained model in the world: text, other formats, hubs."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    generate="""
        GenerateError Generator Sampling TextBuilder default_tokenizer draw keep_top_k keep_top_p
        penalise_repetition select_cache_rows
    """,
    deepseek="""
        HubError LATENT_NORM_EPS PUBLISHED attention_settings config_from_deepseek_v3
        deepseek_obstacles deepseek_settings exported_tensors from_deepseek_v3 later_parts
        model_type_of moved_eps opened_model routing_settings to_deepseek_v3 unlike with_weights_of
    """,
    kimi_linear="""
        config_from_kimi_linear from_kimi_linear kimi_linear_obstacles kimi_linear_settings
        to_kimi_linear
    """,
    hub="""
        KimiCache KimiNbConfig KimiNbForCausalLM load_pretrained model_card save_pretrained
    """,
    nanokimi="""
        ArrayDataset ModelEvaluator ProcessedDataset TextConfig TextDataProcessor Tracking
        dataset_settings from_nanokimi keep_dataset read_config toy_dataset train_on
    """,
    tracking="""
        Label Page TrackedRun finding_facts keep_sending label_of lines_sent mirrored send_apart
        send_findings send_store track tracked_line
    """,
)

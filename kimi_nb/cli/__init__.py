"""The command line."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    entry="""
        add_settings build_parser chosen_run cmd_bench cmd_data cmd_env cmd_eval cmd_generate
        cmd_lab cmd_new_phase cmd_plan cmd_profile cmd_records cmd_report cmd_run cmd_train main
        where_it_stands
    """,
)

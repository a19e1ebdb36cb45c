"""Benchmarks: items, tasks, scores, mistakes."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    items="""
        ASSOCIATIONS COMPLETIONS QUESTIONS SCORED_ITEMS SCORE_CHOICES SUMS TASK_NAMES task_rows
        tasks_folder wordings world_items write_tasks
    """,
    tasks="""
        BenchmarkError GROUPS TASKS Task chance_level pick_tasks read_rows record_choices
        record_results record_rows record_target record_text span_scores squad_results squad_target
    """,
    adapter="""
        ANSWER_TOKENS Answering answer_tokens answering continuation_scores greedy harness_model
    """,
    harness="""
        Results cut_off load_any overall_score run_benchmarks
    """,
    mistakes="""
        attention_map attention_weights by_frequency by_kind by_position document_numbers
        expert_choices expert_map expert_tokens failures item_table loss_by mutual_information
        specialisation token_kind token_losses worst_documents worst_tokens
    """,
    counts="""
        CONSTANTS COUNTED Counts Met as_numbers count_baselines count_table interpolated looked_up
        met scored_pairs table_losses trained_windows with_contexts
    """,
    documents="""
        by_document decide_with_text document_losses score_documents scored_documents scores_file
    """,
    recall="""
        CUPS RECALL_ARMS RECALL_BASE Recall SEQUENCE_TASKS copying_batch draw_state_bytes
        learn_recall recall_accuracy recall_batch recall_figure recall_row record_recall
        recorded_recall tracking_batch
    """,
    scoring="""
        SHARES Scorer choice_scores chosen_rows score_metrics_of share_interval with_share_intervals
    """,
    positions="""
        PART POSITION_ARMS POSITION_BASE WINDOWS loss_by_position position_rows position_run
        positions_figure positions_table record_positions recorded_positions
    """,
    floor="""
        COUNTS_FILE COUNT_LINES Floor MANY_TOKENS PUBLISHED_COUNTS base_records below_floor
        count_lines counted_again floor_in_words floor_of keep_counts known_counts publish_counts
    """,
)

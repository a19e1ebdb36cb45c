"""Words: the paper, the slides, the guide."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    document="""
        DocumentError Figure Manuscript ROOM Section TableBlock Text bring compile_typst inline
        numbered pandoc plain to_html to_markdown to_typst write_document
    """,
    evidence="""
        BOUND Evidence LEVELS PARTS REPEATED RUN_METRICS ReportError WHOLE_LENGTH comparison_table
        compute_words count_of effect_words effects_table figure heading interval kept_tables
        pairs_words parts_words reached runs_table said tally together_words turned verdict_table
    """,
    across="""
        Claim DECIDED Effect MAIN_FIGURES agreement at_size changes_words claims_markdown claims_of
        claims_table claims_words compared counts_words draw_sizes effect_changes effect_text
        effects_in how_large main_figures names_of others settings_apart shared_phases
        sizes_appendix sizes_figure sizes_section sizes_words what_ran
    """,
    background="""
        LIBRARY architecture design introduction methods related_work size_table study_table
        training
    """,
    paper="""
        FIGURES LONGEST READINGS TITLES WHY abstract answers appendices benchmark_table
        combined_tables combined_words conclusion findings negative_results phase_section reading
        reproducibility seeds_words setting_up threats
    """,
    slides="""
        Slide redrawn reference_file screen talk_markdown talk_typst to_markdown_table write_slides
    """,
    guide="""
        ANSWERS Advice CHAPTERS HOWTO Lesson PART_COSTS PART_NAMES VIRTUES advice_table advise
        answers_agree course howto_pages lessons_table part_effects read_lesson sizes wing_lines
    """,
    write="""
        short_report write_report
    """,
)

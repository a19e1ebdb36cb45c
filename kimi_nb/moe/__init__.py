from kimi_nb.model.moe import *  # noqa: F403

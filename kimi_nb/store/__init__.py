from kimi_nb.study.store import *  # noqa: F403

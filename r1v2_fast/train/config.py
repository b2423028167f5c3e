from r1v2_fast.config import *  # noqa: F403

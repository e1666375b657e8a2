"""The runtime: opens a bundle and generates video, without PyTorch."""

from forcing_kv.runtime_trt.backends.stream import Chunk
from forcing_kv.runtime_trt.errors import ForcingKvError
from forcing_kv.runtime_trt.session import Session

__all__ = ["Chunk", "ForcingKvError", "Session"]

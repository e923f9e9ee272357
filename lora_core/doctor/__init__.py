"""What this installation can do: `lora-core doctor`."""

from lora_core.doctor.report import Examination, SelfCheck, examine, self_check

__all__ = ["Examination", "SelfCheck", "examine", "self_check"]

"""One class per task, as PEFT has them. LoRA changes weights only, so what differs is what each may assume."""

from __future__ import annotations

from typing import Any

from lorica.config import TaskType
from lorica.model.peft_model import PeftModel


class _Generates(PeftModel):
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Hand over to the base model's."""
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[operator]


class PeftModelForCausalLM(_Generates, task=TaskType.CAUSAL_LM):
    """A decoder that generates text."""


class PeftModelForSeq2SeqLM(_Generates, task=TaskType.SEQ_2_SEQ_LM):
    """An encoder and a decoder that generates text."""


class PeftModelForSequenceClassification(PeftModel, task=TaskType.SEQ_CLS):
    """A model that classifies texts; its head trains fully."""


class PeftModelForTokenClassification(PeftModel, task=TaskType.TOKEN_CLS):
    """A model that classifies tokens; its head trains fully."""


class PeftModelForQuestionAnswering(PeftModel, task=TaskType.QUESTION_ANS):
    """A model that finds answers in a text; its head trains fully."""


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION):
    """A model whose hidden states are wanted."""

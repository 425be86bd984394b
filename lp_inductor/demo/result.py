"""What the demo found, as text and as JSON."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """One way of running the model.

    Attributes:
        perplexity: over the windows of the text.
        continuation: the text that follows the prompt.
    """

    perplexity: float
    continuation: str


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo prints.

    Attributes:
        model: the model's name.
        table: the attention sites, one a line.
        sites, fused, rope_fused: how many attention calls there are, how many became FP8, and how
            many of those took their rotary embedding with them.
        tokens: how many tokens of text were read.
        prompt: what was continued.
        reference, fp8: the model as it is, and with FP8 attention.
        seconds: wall time of the whole demo.
        stages: wall time of each stage, in seconds; "fp8_perplexity" includes the compilation.
        versions: of Python and the packages that matter.
    """

    model: str
    table: str
    sites: int
    fused: int
    rope_fused: int
    tokens: int
    prompt: str
    reference: Measurement
    fp8: Measurement
    seconds: float
    stages: dict[str, float]
    versions: dict[str, str]

    @property
    def perplexity_change(self) -> float:
        """By which fraction FP8 raises the perplexity."""
        return self.fp8.perplexity / self.reference.perplexity - 1

    def as_json(self) -> dict[str, object]:
        """A flat object that :mod:`json` can write."""
        return {
            "model": self.model,
            "sites": self.sites,
            "fused": self.fused,
            "rope_fused": self.rope_fused,
            "tokens": self.tokens,
            "perplexity_reference": self.reference.perplexity,
            "perplexity_fp8": self.fp8.perplexity,
            "prompt": self.prompt,
            "continuation_reference": self.reference.continuation,
            "continuation_fp8": self.fp8.continuation,
            "seconds": self.seconds,
            "stages": self.stages,
            "versions": self.versions,
        }

    def as_text(self) -> str:
        """A report to read in a terminal."""
        same = self.reference.continuation == self.fp8.continuation
        return "\n".join(
            (
                f"{self.model}: attention sites",
                "",
                self.table,
                "",
                f"Perplexity on {self.tokens} tokens",
                f"  bfloat16  {self.reference.perplexity:.3f}",
                f"  FP8       {self.fp8.perplexity:.3f}  ({self.perplexity_change:+.2%})",
                "",
                f"Greedy continuation of {self.prompt!r}" + (", the same in both" if same else ""),
                f"  bfloat16  {self.reference.continuation!r}",
                f"  FP8       {self.fp8.continuation!r}",
                "",
                f"{self.seconds:.0f} seconds",
            )
        )

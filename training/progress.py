"""Progress of the training and its remaining time."""

import time


class Progress:
    """Prints a line after every `every` steps.  first: the first step of a resumed training."""

    def __init__(self, name: str, steps: int, first: int = 0, every: int = 20) -> None:
        self.name, self.steps, self.first, self.every = name, steps, first, every
        self.began = time.monotonic()

    def tell(self, number: int, text: str) -> None:
        """Report step `number`, counted from 0."""
        done = number + 1
        if done % self.every and done != self.steps:
            return
        gone = time.monotonic() - self.began
        left = gone / (done - self.first) * (self.steps - done)
        print(f"{self.name} {done}/{self.steps}  {text}  {gone:.0f} s, {left / 60:.1f} min left", flush=True)

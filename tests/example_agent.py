"""A classifier of digits as an agent: `agent: {kind: "example_agent:DigitClassifier", hidden: 64}`."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from agents.agent import UNTRACKED, Objective, PlainAgent

ROWS = {"train": slice(1000), "validation": slice(1000, 1400), "test": slice(1400, 1797)}


class DigitClassifier(PlainAgent):
    performance = Objective("accuracy", "maximize", "share of digits")

    def __init__(self, options, widths=None, data=None, device="cpu"):
        self.options = {"hidden": 64, "updates": 400} | dict(options)
        self.widths = dict(widths or dict.fromkeys(("0", "2"), self.options["hidden"]))
        self.components = {"features": ["0", "2"], "head": ["4"]}  # paths in the model
        a, b = self.widths["0"], self.widths["2"]  # a group is called like the layer that makes it
        layers = nn.Linear(64, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 10)
        self.model = nn.Sequential(*layers).to(device)
        if data is None:
            images, labels = map(torch.tensor, load_digits(return_X_y=True))
            data = {"images": images.float() / 16, "labels": labels}
        self.rows = {name: tensor.to(device) for name, tensor in data.items()}

    def data(self):
        return self.rows

    def program(self, model, inputs):
        return {"logits": model(inputs["images"])}

    def calibration_inputs(self, rows, seed):
        return {"images": self.rows["images"][ROWS["train"]][:rows]}

    def example_inputs(self, count):
        return self.rows["images"][ROWS["test"]][:count]

    def train(self, seed, tracker, progress):
        self.reset(seed)
        self.fine_tune("supervised", self.options["updates"], seed, progress, tracker or UNTRACKED)

    def fine_tune(self, method, updates, seed, progress, tracker=UNTRACKED):
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        for _ in range(updates):
            rows = torch.randint(1000, (128,), generator=generator)
            optimizer.zero_grad()
            with tracker.capture():
                logits = self.model(self.rows["images"][rows])
                nn.functional.cross_entropy(logits, self.rows["labels"][rows]).backward()
            tracker.update()
            optimizer.step()

    def evaluate(self, split):
        images, labels = (self.rows[name][ROWS[split]] for name in ("images", "labels"))
        return {"accuracy": (self.act(images).argmax(dim=1) == labels).double().mean().item()}

    def trivial(self, split):
        return 0.1

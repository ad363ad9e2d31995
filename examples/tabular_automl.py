"""Model selection end to end on a table: scikit-learn's breast cancer data, against scikit-learn's own models.

Points are judged by stratified 5-fold cross-validation; what features matter is learned by gradient, as L2 penalties.
"""

import lightning as L
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import QuantileTransformer, StandardScaler
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from hypergrad import Hyperparameter, Unrolled, split
from hypergrad.callbacks import EarlyStopping, HyperGradient
from hypergrad.search import Categorical, Float, Int, Study, cross_validate

TRIALS, EPOCHS, FOLDER = 12, 40, "runs/tabular_automl"
SPACE = {
    "scaling": Categorical(["standard", "quantile"]),
    "model": Categorical(["linear", "mlp"]),
    "width": Int(8, 64, log=True, when={"model": "mlp"}),
    "features": Categorical(["all", "learned"]),
    "lr": Float(1e-3, 3e-2, log=True),
    "batch_size": Categorical([32, 64]),
}


class Table(L.LightningModule):
    def __init__(self, params):
        super().__init__()
        self.lr, width = params["lr"], params.get("width", 2)
        hidden = [torch.nn.ReLU(), torch.nn.Linear(width, 2)] if params["model"] == "mlp" else []
        self.net = torch.nn.Sequential(torch.nn.Linear(30, width), *hidden)
        self.penalty = Hyperparameter(torch.full((30,), 1e-3)) if params["features"] == "learned" else None

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.net(batch[0]), batch[1])
        return loss if self.penalty is None else loss + (self.penalty() * self.net[0].weight.square()).sum()

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        accuracy = (logits.argmax(1) == batch[1]).float().mean()
        self.log_dict({"val_loss": cross_entropy(logits, batch[1]), "val_accuracy": accuracy})

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def load():
    x, y = load_breast_cancer(return_X_y=True)
    return split(TensorDataset(torch.tensor(x), torch.tensor(y)), (0.75, 0.25), stratify=y)  # to search on, to test on


def scaled(params, train, *others):
    scaler = StandardScaler() if params["scaling"] == "standard" else QuantileTransformer(n_quantiles=50)
    scaler.fit(train[:][0])  # on the training data alone
    return [TensorDataset(torch.tensor(scaler.transform(p[:][0])).float(), p[:][1]) for p in (train, *others)]


def fit(trial, train, val):
    callbacks, module = [EarlyStopping(restore_best_weights=True)], Table(trial.params)
    data, held_out = scaled(trial.params, train, val)
    if module.penalty is not None:
        data, hyper = split(data, (0.85, 0.15), stratify=data[:][1])
        callbacks.append(HyperGradient(module.penalty, estimator=Unrolled(3), val_dataloaders=DataLoader(hyper, 64)))
    trainer = trial.trainer(max_epochs=EPOCHS, callbacks=callbacks, accelerator="cpu", devices=1)
    loaders = DataLoader(data, trial.params["batch_size"], shuffle=True), DataLoader(held_out, len(held_out))
    trainer.fit(module, *loaders, ckpt_path=trial.checkpoint)
    return module.eval(), trainer.validate(module, loaders[1], verbose=False)[0]


def train(trial):
    data = load()[0]
    return cross_validate(lambda fold, *parts: fit(fold, *parts)[1], data, stratify=data[:][1], trial=trial).metrics


def judge(trial):
    data, test = load()
    parts = split(data, (0.85, 0.15), stratify=data[:][1])
    module, (x, y) = fit(trial, *parts)[0], scaled(trial.params, parts[0], test)[1][:]
    return {"val_loss": 0.0, "test_accuracy": (module.net(x).argmax(1) == y).float().mean()}


def main():
    study = Study(FOLDER, space=SPACE, sampler="tpe", pruner=("median", {"n_startup_trials": 4}), seed=0)
    study.run(train, TRIALS, workers=2, retries=1)
    print(f"chosen, with cross-validated accuracy {study.best.metrics['val_accuracy']:.4f}: {study.best.params}")
    (chosen,) = Study(f"{FOLDER}/chosen", space=dict(study.best.params)).run(judge, 1)  # all constants: one point
    print(f"test accuracy {chosen.metrics['test_accuracy']:.4f} of the chosen model")
    data, test = load()
    for rival in (make_pipeline(StandardScaler(), LogisticRegression()), HistGradientBoostingClassifier()):
        print(f"test accuracy {rival.fit(*data[:]).score(*test[:]):.4f} of {rival}")


if __name__ == "__main__":
    main()

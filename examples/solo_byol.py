"""BYOL with solo-learn, bare and with recon_aux attached."""

from common import Study
from lightning import Trainer
from solo.methods import METHODS
from solo_common import config

from recon_aux.integrations.solo_learn import attach

OPTIONS = {"proj_hidden_dim": 512, "proj_output_dim": 128, "pred_hidden_dim": 256}

if __name__ == "__main__":
    study = Study(__doc__, Trainer)

    if study.compare:
        model = METHODS["byol"](config(study, "byol", **OPTIONS))
        study.trainer().fit(model, study.loader(indexed=True))
        study.measure("bare", model.backbone)

    model = METHODS["byol"](config(study, "byol", **OPTIONS))
    model = attach(model, **study.options)  # the one line
    study.trainer().fit(model, study.loader(indexed=True))
    study.measure("attached", model.backbone, model.recon_aux)

    study.report()

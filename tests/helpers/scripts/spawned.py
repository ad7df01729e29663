"""Train attached in a process that is spawned, to which the model is sent."""

from __future__ import annotations

from torch.utils.data import DataLoader

from helpers.data import Views
from helpers.models import Siamese
from helpers.training import trainer
from helpers.weights import assert_trained, decoder_of
from recon_aux.integrations.lightly import attach

if __name__ == "__main__":
    model = attach(Siamese())
    before = decoder_of(model)
    trainer(strategy="ddp_spawn", devices=1).fit(model, DataLoader(Views(), batch_size=4))
    assert_trained(model, before)
    print("trained")

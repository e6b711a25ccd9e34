"""The objectives by name."""

import dataclasses

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.objectives import hyperparameters
from dspo_jax.objectives.awm import AWM
from dspo_jax.objectives.denoising import DDPM, RWR, SFT
from dspo_jax.objectives.dpo import (
    DMPO,
    IPO,
    NPO,
    SDPO,
    AlphaDPO,
    DiffusionDPO,
    DiffusionDPOL2,
    Hinge,
    LinearDPO,
)
from dspo_jax.objectives.dspo import DSPO, DSPOSDXL, DSPOEnergy, DSPORef
from dspo_jax.objectives.kto import KTO
from dspo_jax.objectives.lists import CRD, DGPO, LPOList
from dspo_jax.objectives.mapo import MaPO
from dspo_jax.objectives.nft import NFT
from dspo_jax.objectives.objective import Objective
from dspo_jax.objectives.orpo import ORPO
from dspo_jax.objectives.rpo import DiffusionRPO

OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls
    for cls in (
        DDPM,
        SFT,
        RWR,
        DiffusionDPO,
        DiffusionDPOL2,
        SDPO,
        IPO,
        DMPO,
        AlphaDPO,
        Hinge,
        LinearDPO,
        DiffusionRPO,
        NPO,
        KTO,
        NFT,
        AWM,
        LPOList,
        DGPO,
        CRD,
        MaPO,
        ORPO,
        DSPO,
        DSPORef,
        DSPOEnergy,
        DSPOSDXL,
    )
}


def get_objective(name: str, **arguments: object) -> Objective:
    """Makes the objective of a name or alias, with the given hyperparameters and defaults for the others.

    Raises:
      UserError: Unknown name or argument, or a value out of range; the message gives the nearest valid name.
    """
    name = spelling.OBJECTIVE_ALIASES.get(name, name)
    if name not in OBJECTIVES:
        raise UserError(spelling.unknown("config.objective.name", str(name), OBJECTIVES))
    cls = OBJECTIVES[name]
    return cls(**hyperparameters.check(dataclasses.fields(cls), name, arguments))

"""Methods by name: a new one is its file, a line here, a YAML and a test."""

from subnet_pipelines.methods.apd import APD
from subnet_pipelines.methods.base import Clock, Method, MethodConfig, Phase, Prediction
from subnet_pipelines.methods.batche import BatchE
from subnet_pipelines.methods.den import DEN
from subnet_pipelines.methods.ewc import EWC
from subnet_pipelines.methods.finetune import Finetune
from subnet_pipelines.methods.hopsupsup import HopSupSup
from subnet_pipelines.methods.impresslearn import ImpressLearn
from subnet_pipelines.methods.lasem import LASEM
from subnet_pipelines.methods.mtl import MTL
from subnet_pipelines.methods.nns import NNs
from subnet_pipelines.methods.packnet import PackNet
from subnet_pipelines.methods.prognn import ProgNN
from subnet_pipelines.methods.psp import PSP
from subnet_pipelines.methods.separate_heads import SeparateHeads
from subnet_pipelines.methods.stl import STL
from subnet_pipelines.methods.supsup import SupSup
from subnet_pipelines.methods.wsn import WSN

_ALL = (
    STL,
    MTL,
    Finetune,
    EWC,
    PackNet,
    WSN,
    SupSup,
    NNs,
    HopSupSup,
    ImpressLearn,
    LASEM,
    ProgNN,
    APD,
    DEN,
    BatchE,
    PSP,
    SeparateHeads,
)
METHODS: dict[str, type[Method]] = {m.name: m for m in _ALL}

__all__ = ["METHODS", "Clock", "Method", "MethodConfig", "Phase", "Prediction"]

"""Networks, in linen: the population needs parameters and nothing else as a tree.

All take the ``dtype`` of their computation, as Flax's layers do: by default that of
inputs and parameters. Parameters and statistics of batches are float32. A network with
``trains`` is another one in training, and is told so by ``train``.
"""

from benchmarks.networks.attention import LSTMAttention
from benchmarks.networks.cnn import CNN, UnstridedCNN
from benchmarks.networks.dense import MLP, NormMLP
from benchmarks.networks.densenet import DenseNet
from benchmarks.networks.efficientnet import EfficientNetLite0
from benchmarks.networks.fixup import ResNet
from benchmarks.networks.resized import Resized
from benchmarks.networks.resnets import NormResNet
from benchmarks.networks.vgg import VGG

__all__ = [
    "CNN",
    "MLP",
    "VGG",
    "DenseNet",
    "EfficientNetLite0",
    "LSTMAttention",
    "NormMLP",
    "NormResNet",
    "ResNet",
    "Resized",
    "UnstridedCNN",
]

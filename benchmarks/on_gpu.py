""" All that wants a GPU, in calls of some minutes that go on where the last one stopped

    python benchmarks/on_gpu.py --minutes 9 --scripts pytorch-image-models --cifar10 cifar10 --tome ToMe --evit evit \
        --features vit_s_focus.onnx --photos imagenet-sample-images \
        --weights deit_tiny.safetensors --imagenet imagenet/val

It needs torch, Triton, timm and this checkout, which does not have to be installed; step 'frozen' also needs matplotlib
and onnx. The steps, in their order:

* equal: whether the kernels compute what the library computes without them
* compiled, graphs, eager: time of inference beside the dense model, with and without kernels, and beside ToMe and EViT
* training: time of training steps, compiled and eager
* scripts: timm's train.py and validate.py
* tests: those that compute
* frozen: what is left of frozen weights that compute in bfloat16
* cifar: CIFAR-10 from scratch, three seeds

What is measured goes to on_gpu_<device>.jsonl at once, a line each, so nothing is lost when the command is killed; the
next call leaves out what this state of the library has been measured in on such a machine. on_gpu_<device>.md has the
tables, on_gpu_<device>_profiles.txt which kernels take the time. A step whose folders are not given is left out.

    python benchmarks/on_gpu.py --device cpu --quick --results output

tries all of it at tiny sizes, which says nothing of speed.
"""
import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the library of this checkout, installed or not
    from gpu.main import main
    main()

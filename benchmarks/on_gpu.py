""" All measurements that need a GPU, in calls of some minutes that continue each other

    python benchmarks/on_gpu.py --minutes 9 --scripts pytorch-image-models --cifar10 cifar10 --tome ToMe --evit evit \
        --features vit_s_focus.onnx --photos imagenet-sample-images \
        --weights deit_tiny.safetensors --imagenet imagenet/val

It needs torch, Triton, timm and this checkout, which does not have to be installed. Step 'frozen' also needs
matplotlib and onnx. The steps in order are:

* equal: comparison of the results with and without kernels
* compiled, graphs, eager: time of inference with and without kernels, compared with the dense model, ToMe and EViT
* training: time of training steps, compiled and eager
* scripts: timm's train.py and validate.py
* tests: the tests that compute on the device
* frozen: accuracy of frozen weights in bfloat16
* cifar: CIFAR-10 from scratch, three seeds

Each result is written to on_gpu_<device>.jsonl at once, so nothing is lost when the command is killed. The next call
skips what was measured with this state of the library on such a machine. on_gpu_<device>.md has the tables,
and on_gpu_<device>_profiles.txt has the kernels that take the most time. A step whose folders are not given is skipped.

    python benchmarks/on_gpu.py --device cpu --quick --results output

This tries all steps at tiny sizes. Its times have no meaning.
"""
import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the library of this checkout, installed or not
    from gpu.main import main
    main()

"""Shows what 16-bit numbers can hold and what a loss scale does: `python launch/lessons/loss_scale.py`."""

import torch
from torch import Tensor, nn

from mnist_dist import build_model


def gradient(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Returns the gradient of `scale` times the loss, computed under autocast with activations in `dtype`."""
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = nn.functional.cross_entropy(model(images), labels)
    (loss * scale).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


print("              largest   smallest   next after 1")
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    limits = torch.finfo(dtype)
    print(f"{str(dtype)[6:]:12}  {limits.max:.1e}    {limits.smallest_normal * limits.eps:.1e}   1 + {limits.eps:.1e}")

# A network that has almost learned 32 images by heart: its gradients are small.
torch.manual_seed(0)
model, images, labels = build_model("lenet5"), torch.rand(32, 1, 28, 28), torch.arange(32) % 10
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(300):
    gradient(model, images, labels, torch.float32)
    optimizer.step()

exact = gradient(model, images, labels, torch.float32)
print("\n              scale    lost to 0   error")
for dtype, exponent in ((torch.bfloat16, 0), *((torch.float16, exponent) for exponent in (0, 8, 16, 40))):
    found = gradient(model, images, labels, dtype, 2.0**exponent) / 2.0**exponent
    lost = (found[exact != 0] == 0).float().mean()
    error = (found - exact).norm() / exact.norm()
    result = f"{lost:9.1%}   {error:6.1%}" if found.isfinite().all() else "   not finite"
    print(f"{str(dtype)[6:]:12}  2^{exponent:<2} {result}")

scaler = torch.amp.GradScaler("cpu", init_scale=2.0**37, growth_interval=3)
scales = []
for _ in range(12):
    scales.append(f"2^{torch.tensor(scaler.get_scale()).log2():.0f}")
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = nn.functional.cross_entropy(model(images), labels)
    scaler.scale(loss).backward()
    scaler.step(optimizer)  # divides the gradients by the scale; no update if one of them is not finite
    scaler.update()
print("\nscale of 12 steps:", *scales)

"""Train a LoRA adapter on a quantized transformer, save it, and load it onto another copy.

The packed layers stay as they are; gradients flow through them into the adapters. A FLUX of random weights, small
enough for seconds, learns to give one fixed output.

Run: python examples/train_lora.py
"""

from pathlib import Path

import peft
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import lrqdit

torch.manual_seed(0)
model = FluxTransformer2DModel(
    patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
    joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
)  # fmt: skip
inputs = {
    "hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 6, 32),
    "pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([0.5, 0.5]), "txt_ids": torch.zeros(6, 3),
    "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
}  # fmt: skip
target = torch.randn(2, 16, 4)

lrqdit.quantize(model, "w4a8", forward_loop=lambda module: module(**inputs), show_progress=False)
folder = Path("examples-out/flux")
model.save_pretrained(folder)

model.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_k", "to_v", "proj_mlp"], r=8, lora_alpha=8))
trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
print(f"{sum(parameter.numel() for parameter in trained):,} parameters are trained, the packed layers are not")
optimizer = torch.optim.AdamW(trained, lr=0.02)
for step in range(30):
    loss = nn.functional.mse_loss(model(**inputs).sample, target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (0, 29):
        print(f"step {step}: loss {loss.item():.4f}")

model.save_lora_adapter(folder / "adapter")
other = FluxTransformer2DModel.from_pretrained(folder)
other.load_lora_adapter(folder / "adapter", prefix=None, weight_name="pytorch_lora_weights.safetensors")
with torch.no_grad():
    difference = float((other(**inputs).sample - model(**inputs).sample).abs().max())
print(f"another quantized copy with the adapter differs by {difference:.1e}")

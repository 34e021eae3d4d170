"""A small GPT-2 and a small recurrent network of PyTorch's own modules, for test_torch_weights.py:
`python torch_weights_twin.py OUT.npz` writes their weights, tokens, and logits in float64.

It runs in an interpreter that has PyTorch.
"""

import sys

import numpy as np
import torch
from torch import nn

V, T, C, LAYERS, HEADS = 7, 6, 8, 2, 2
E, H = 5, 4


class Attention(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C, bias), nn.Linear(C, C, bias)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (
            part.view(b, t, HEADS, C // HEADS).transpose(1, 2)
            for part in self.c_attn(x).split(C, dim=2)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(b, t, C))


class Feed(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(C, 4 * C, bias), nn.Linear(4 * C, C, bias)

    def forward(self, x):
        return self.c_proj(nn.functional.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
        self.attn, self.mlp = Attention(bias), Feed(bias)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(V, C),
                "wpe": nn.Embedding(T, C),
                "h": nn.ModuleList([Block(bias) for _ in range(LAYERS)]),
                "ln_f": nn.LayerNorm(C, bias=bias),
            }
        )
        self.lm_head = nn.Linear(C, V, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, x):
        parts = self.transformer
        h = parts["wte"](x) + parts["wpe"](torch.arange(x.shape[1]))
        for block in parts["h"]:
            h = block(h)
        return self.lm_head(parts["ln_f"](h))


class Recurrent(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(V, E), nn.Linear(H, V)
        self.cell = make(E, H, num_layers=LAYERS, batch_first=True)

    def forward(self, x):
        return self.linear(self.cell(self.embedding(x))[0])


def main(path):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    x = torch.randint(0, V, (3, T))
    modules = {
        "gpt": GPT(True),
        "gpt_no_bias": GPT(False),
        "lstm": Recurrent(nn.LSTM),
        "gru": Recurrent(nn.GRU),
        "vanilla": Recurrent(nn.RNN),
    }
    found = {"x": x.numpy()}
    for name, module in modules.items():
        with torch.no_grad():
            for parameter in module.parameters():  # also those that begin with 0
                parameter.add_(0.3 * torch.randn_like(parameter))
            found[f"{name}/logits"] = module(x).numpy()
        for key, value in module.state_dict().items():
            found[f"{name}/state/{key}"] = value.numpy()
    np.savez(path, **found)


if __name__ == "__main__":
    main(sys.argv[1])

"""temporary"""
import numpy as np
import torch
from torch import nn


class LeNet(nn.Sequential):
    def __init__(self, c):
        super().__init__(nn.Conv2d(3,6,5),nn.ReLU(),nn.MaxPool2d(2),nn.Conv2d(6,16,5),nn.ReLU(),nn.MaxPool2d(2),nn.Flatten(),nn.Linear(400,120),nn.ReLU(),nn.Linear(120,84),nn.ReLU(),nn.Linear(84,c))
class Cnn(nn.Sequential):
    def __init__(self, c):
        super().__init__(nn.Conv2d(3,32,4,2,1,bias=False),nn.BatchNorm2d(32),nn.ReLU(),nn.Conv2d(32,64,3,padding=1,bias=False),nn.BatchNorm2d(64),nn.ReLU(),nn.MaxPool2d(2),nn.Conv2d(64,128,3,padding=1,bias=False),nn.BatchNorm2d(128),nn.ReLU(),nn.AdaptiveMaxPool2d(2),nn.Flatten(),nn.Linear(512,c))
NETWORKS={"cnn":Cnn,"lenet":LeNet}
def build(name, num_classes, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed); return NETWORKS[name](num_classes)
def get_weights(n): return [v.detach().cpu().numpy().copy() for v in n.state_dict().values()]
def set_weights(n, w):
    n.load_state_dict({k: torch.from_numpy(np.array(a)) for k,a in zip(n.state_dict(), w, strict=True)})
def statistics(n):
    b={k for k,_ in n.named_buffers()}; return [i for i,k in enumerate(n.state_dict()) if k in b]
def train(network, images, labels, *, epochs, batch_size, learning_rate, start, end, seed, on_batch=None):
    g=torch.Generator().manual_seed(seed); opt=torch.optim.SGD(network.parameters(),lr=learning_rate,momentum=.9,weight_decay=5e-4)
    network.train(); n=len(labels); steps=epochs*max(1,n//batch_size); s=0; tot=0.
    for _ in range(epochs):
        for idx in torch.randperm(n,generator=g).split(batch_size)[:max(1,n//batch_size)]:
            f=start+(end-start)*s/steps; opt.param_groups[0]["lr"]=learning_rate*min(f/.2+.01,(1-f)/.8)
            x=images[idx].float().sub(120).div(64); loss=nn.functional.cross_entropy(network(x),labels[idx]); opt.zero_grad(); loss.backward(); opt.step(); s+=1; tot+=loss.item()
            if on_batch: on_batch(s,steps)
    return tot/s
@torch.inference_mode()
def evaluate(network, images, labels):
    network.eval(); l=0.;c=0
    for i in range(0,len(labels),500):
        o=network(images[i:i+500].float().sub(120).div(64)); l+=nn.functional.cross_entropy(o,labels[i:i+500],reduction="sum").item(); c+=(o.argmax(1)==labels[i:i+500]).sum().item()
    return l/len(labels), c/len(labels)
@torch.inference_mode()
def predict(network, images):
    network.eval(); return network(images.float().sub(120).div(64)).softmax(1)

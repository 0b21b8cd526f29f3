"""Pranam: replicas of a model, trained through a shared embedding."""

from pranam_optax import fitting as fitting
from pranam_optax import original as original
from pranam_optax import problems as problems
from pranam_optax._elastic import ElasticAveragingState as ElasticAveragingState
from pranam_optax._elastic import elastic_averaging as elastic_averaging
from pranam_optax._embedding import Embedding as Embedding
from pranam_optax._embedding import mlp_embedding as mlp_embedding
from pranam_optax._metrics import replica_metrics as replica_metrics
from pranam_optax._per_replica import per_replica as per_replica
from pranam_optax._pranam import PranamState as PranamState
from pranam_optax._pranam import pranam as pranam
from pranam_optax._reparametrize import ReparametrizeState as ReparametrizeState
from pranam_optax._reparametrize import reparametrize as reparametrize
from pranam_optax._replicas import average_replicas as average_replicas
from pranam_optax._replicas import best_replica as best_replica
from pranam_optax._replicas import replica_value_and_grad as replica_value_and_grad
from pranam_optax._replicas import replicate as replicate
from pranam_optax._replicas import select_replica as select_replica
from pranam_optax._resample import resample_replicas as resample_replicas
from pranam_optax._revive import revive_replicas as revive_replicas
from pranam_optax.fitting._fit import fit as fit
from pranam_optax.fitting._minimize import minimize as minimize

__version__ = "0.2.0"

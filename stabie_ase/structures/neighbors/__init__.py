"""Neighbour lists: one kind of list, and several ways to build it with one signature."""

from stabie_ase.structures.neighbors.list import NeighborList, VerletList, all_pairs, neighbor_list

__all__ = ["NeighborList", "VerletList", "all_pairs", "neighbor_list"]

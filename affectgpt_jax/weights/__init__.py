"""Weights on disk to parameter trees and back."""

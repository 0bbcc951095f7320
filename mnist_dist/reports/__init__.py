"""Pictures and pages made from a run folder: matplotlib figures written as PNG, and the table of a model's layers."""

from mnist_dist.reports.model_summary import summarize_model
from mnist_dist.reports.plots import (
    plot_augmented_samples,
    plot_confusion_matrix,
    plot_misclassified,
    plot_per_batch_loss,
    plot_predictions,
    plot_training_history,
)

__all__ = [
    "plot_augmented_samples",
    "plot_confusion_matrix",
    "plot_misclassified",
    "plot_per_batch_loss",
    "plot_predictions",
    "plot_training_history",
    "summarize_model",
]

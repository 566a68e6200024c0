"""Looking into models and trainings; imports nothing above the callbacks: no learner, experiment or integration."""

"""How long clients take for a training, and what can be expected of them; all times in seconds, of no clock."""

Working = list[tuple[int, float]]  # clients at work: (partition, seconds since its training began)


class Pace:
    """Learns from every training that ends."""

    def __init__(self, patience: float):
        self.patience = patience
        self.durations: dict[int, float] = {}  # of each partition's last training

    def took(self, partition: int, seconds: float) -> None:
        self.durations[partition] = max(seconds, 1e-6)

    def usual(self, partition: int) -> float:
        """As long as its last training; for a new client, as the others on average."""
        known = self.durations.values()
        return self.durations.get(partition, sum(known) / len(known) if known else 0.0)

    def moment(self) -> float:
        """How long an update waits for others that are about to come: a part of the fastest client's training."""
        return self.patience * min(self.durations.values(), default=0.0)

    def is_more_coming(self, working: Working) -> bool:
        """Whether one of them can be expected within a moment, be it overdue: a run's later trainings take longer.

        Who takes more than twice as long as usual is not waited for.
        """
        usual = ((self.usual(partition), since) for partition, since in working)
        return any(whole - self.moment() <= since <= 2 * whole for whole, since in usual)

    def arrivals_within(self, seconds: float, working: Working) -> int:
        """How many updates they will send in that time. Who takes longer than usual is given as long again."""
        count = 0
        for partition, since in working:
            usual = max(self.usual(partition), since)
            left = usual - since or since
            if left < seconds:
                count += 1 + int((seconds - left) / usual)
        return count

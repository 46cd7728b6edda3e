"""A report's page as data, and evaluations written by hand."""

import json
from html.parser import HTMLParser


class Page(HTMLParser):
    """Tables (id -> rows of (text, data-value)), texts by id, tags, and every address."""

    def __init__(self, path):
        super().__init__()
        self.tables, self.texts, self.tags, self.addresses = {}, {}, [], []
        self._table, self._open = None, []
        self.feed(path.read_text())
        self.data = json.loads(self.texts["data"])

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.addresses += [attrs[k] for k in ("src", "href", "action", "data") if k in attrs]
        if tag not in ("meta", "img", "br", "link", "input"):
            self._open.append((tag, attrs.get("id")))
        if tag == "table":
            self._table = self.tables.setdefault(attrs["id"], [])
        elif tag == "tr":
            self._table.append([])
        elif tag == "td":
            self._table[-1].append(["", attrs.get("data-value")])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open and self._open[-1][0] == "td":
            self._table[-1][-1][0] += data
        for _, name in self._open:
            if name:
                self.texts[name] = self.texts.get(name, "") + data

    def rows(self, name):
        """Rows of a table's body."""
        return [row for row in self.tables[name] if row]


def figure(value, low=None, high=None):
    return {"value": value, "ci95": None if low is None else [low, high]}


def by_hand(means, gaps=None, **changes):
    """evaluation.json of ``{name: (dream, real or None)}``; ``gaps``: pair -> its interval."""
    played = [p for p, k in (("dream", 0), ("real", 1)) if None not in [m[k] for m in
                                                                       means.values()]]

    def place(mean):
        return {"mean": mean, "sd": 1.0, "ci95": [mean - 1, mean + 1], "n": 20, "truncated": 5,
                "mean_length": 9.0}

    names = list(means)
    pairs = [{"first": a, "second": b, "place": where, "paired": True,
              "difference": means[a][k] - means[b][k],
              "ci95": (gaps or {}).get((a, b), [-1.0, 1.0]), "separated": None,
              "episodes_needed": 30, "episodes_needed_unpaired": None}
             for k, where in enumerate(played)
             for i, a in enumerate(names) for b in names[i + 1:]]
    both = "real" in played
    gap = [d - r for d, r in means.values()] if both else []
    about = {"command": "worldgym evaluate", "commit": "abc", "machine": "a box", "date": "today"}
    return {
        "about": about, "world": "hand", "unit": "tics", "episodes": 20, "planned_episodes": 20,
        "policies": [{"name": n, "source": n, "dream": place(d),
                      "real": place(r) if both else None,
                      "optimism": figure(d - r, d - r - 2, d - r + 2) if both else None}
                     for n, (d, r) in means.items()],
        "pairs": pairs, "paired_episode_ratio": None, "sequential": None, "notes": ["A note."],
        "agreement": {"pearson_r": figure(0.5, 0.1, 0.9), "kendall_tau": None, "spearman": None,
                      "mmrv": figure(2.0), "optimism": figure(sum(gap) / len(gap), -1.0, 5.0)}
        if both else None,
        "drift": [{"step": 1, "dream": 1.0, "dream_ci95": None, "real": 0.0, "real_ci95": None}]
        if both else None, **changes}

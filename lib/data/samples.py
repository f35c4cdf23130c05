"""Short texts of several kinds, on which tokenizers can be compared; all of them ours."""

SAMPLES = {
    "prose": """The harbour was empty when they came down to it in the morning. Fog lay on the
water, and somewhere behind it a bell kept time for nobody. "You said there would be a boat," said
Anna, not unkindly; she had slept badly and wanted coffee more than she wanted to be right. Her
brother shrugged. There had been a boat yesterday, and the day before, and he had seen no reason why
the sea should change its habits on their account. They sat on the wall and waited, and little by
little the other side appeared.""",
    "Python code": """def moving_average(values, window):
    \"\"\"Yield the mean of each run of `window` neighbours.\"\"\"
    if window < 1 or window > len(values):
        raise ValueError(f"window must be in 1..{len(values)}, not {window}")
    total = sum(values[:window])
    for i in range(window, len(values) + 1):
        yield total / window
        if i < len(values):
            total += values[i] - values[i - window]


class Timer:
    def __enter__(self):
        self.start = time.perf_counter()
        return self

    def __exit__(self, *exc_info):
        self.elapsed = time.perf_counter() - self.start
""",
    "Markdown": """# Getting started

1. Install the package: `pip install example`
2. Create a file named **config.yaml** and fill in the fields
3. Run `example serve --port 8080` and open <http://localhost:8080>

| option | default | meaning |
|--------|---------|---------|
| `port` | 8080 | where the server listens |
| `debug` | false | print every request |

> **Note:** see the [manual](https://example.org/manual#install) for *advanced* settings.
""",
    "numbers": """year,population,growth
1990,5327231061,1.74
2000,6143493823,1.32
2010,6956823603,1.24
2020,7794798739,1.05
17 * 24 = 408; 408 / 12 = 34; 34.5 + 0.25 = 34.75; 2^16 = 65536; 65536 - 1 = 65535
3.14159265358979, 2.71828182845905, 1.41421356237310, 0.57721566490153
+49 30 1234567, 192.168.0.254, 2026-11-20T21:50:03Z, 0x7fff5fbff8c0, 1,048,576 bytes, $1,299.99
""",
    "other languages": """Der Zug nach München fährt heute leider nicht; die nächste steht an.
La niña corrió hacia el jardín, pero ya no había nadie.
Où est donc passée la clé de l'armoire ?
Поезд отправляется через десять минут.
会议将于明天上午九点开始，请准时参加。
今日はとても天気がいいので、公園へ行きましょう。
내일 아침에 다시 전화하겠습니다.
يبدأ الدرس في الساعة التاسعة صباحا. मुझे एक कप चाय चाहिए। Η βιβλιοθήκη ανοίγει στις οκτώ.""",
}

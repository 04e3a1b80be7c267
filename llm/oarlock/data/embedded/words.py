"""Word lists of the embedded instruction tasks."""

# ruff: noqa: SIM905 - a list of words reads better as words

ENGLISH_CHINESE = dict(
    line.split()
    for line in """
    apple 苹果
    water 水
    fire 火
    mountain 山
    river 河
    sun 太阳
    moon 月亮
    star 星星
    tree 树
    flower 花
    bird 鸟
    fish 鱼
    dog 狗
    cat 猫
    horse 马
    cow 牛
    sheep 羊
    book 书
    pen 笔
    table 桌子
    chair 椅子
    door 门
    window 窗户
    house 房子
    car 汽车
    train 火车
    ship 船
    road 路
    city 城市
    school 学校
    teacher 老师
    student 学生
    doctor 医生
    friend 朋友
    mother 母亲
    father 父亲
    hand 手
    eye 眼睛
    ear 耳朵
    heart 心
    rain 雨
    snow 雪
    wind 风
    cloud 云
    spring 春天
    summer 夏天
    autumn 秋天
    winter 冬天
    tea 茶
    rice 米饭
    bread 面包
    milk 牛奶
    egg 鸡蛋
    salt 盐
    gold 金
    paper 纸
    music 音乐
    picture 图画
    letter 信
    clock 钟
    """.split("\n")
    if line.strip()
)

CAPITALS = dict(
    line.split()
    for line in """
    France Paris
    Japan Tokyo
    China Beijing
    Italy Rome
    Spain Madrid
    Germany Berlin
    Russia Moscow
    Egypt Cairo
    Greece Athens
    Norway Oslo
    Sweden Stockholm
    Poland Warsaw
    Austria Vienna
    Portugal Lisbon
    Ireland Dublin
    Kenya Nairobi
    Cuba Havana
    Peru Lima
    Chile Santiago
    Canada Ottawa
    India Delhi
    Iran Tehran
    Iraq Baghdad
    Thailand Bangkok
    Vietnam Hanoi
    Finland Helsinki
    Denmark Copenhagen
    Hungary Budapest
    Turkey Ankara
    Belgium Brussels
    """.split("\n")
    if line.strip()
)

OPPOSITES = [
    tuple(pair.split("/"))
    for pair in (
        "hot/cold big/small up/down left/right open/closed light/dark fast/slow high/low old/new rich/poor "
        "wet/dry full/empty hard/soft loud/quiet early/late long/short strong/weak thick/thin true/false happy/sad"
    ).split()
]

OPPOSITES_CHINESE = [
    tuple(pair.split("/"))
    for pair in (
        "大/小 多/少 上/下 左/右 高/低 长/短 快/慢 新/旧 冷/热 轻/重 黑/白 好/坏 远/近 早/晚 开/关 前/后 真/假 强/弱"
    ).split()
]

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
DAYS_CHINESE = "星期一 星期二 星期三 星期四 星期五 星期六 星期日".split()
MONTHS = "January February March April May June July August September October November December".split()

"""The objects of the embedded demo: what they are called, and which OpenMoji drawings show them.

The table is data: `kind: name/synonym = emoji_name emoji_name; …`. Several drawings of one object (a dog, a dog's face)
are variants of one class; without "=" the drawing is the emoji of that name. A `*` marks the objects that no training
scene or caption ever shows: the demo's `unseen` part asks for them. No unseen object's name is a word of a seen one's.
"""

from dataclasses import dataclass
from functools import cache

_TABLE = """
animal: dog/puppy = dog dog_face guide_dog; poodle; *wolf; *fox; raccoon; cat/kitten = cat cat_face; black cat; lion;
  tiger = tiger tiger_face; *leopard; horse = horse horse_face; unicorn; zebra; *deer; moose; bison; ox; water buffalo;
  cow = cow cow_face; pig = pig pig_face; *wild boar = boar; ram; sheep = ewe; goat; camel = camel two-hump_camel;
  llama; giraffe; elephant; *mammoth; rhinoceros/rhino; hippopotamus/hippo; mouse = mouse mouse_face; rat; hamster;
  rabbit/bunny = rabbit rabbit_face; *chipmunk/squirrel; *beaver; hedgehog; bat; bear; polar bear; koala; panda; sloth;
  *otter; skunk; *kangaroo; badger; gorilla; *orangutan; monkey = monkey monkey_face; donkey
bird: turkey; hen = chicken; rooster; chick = baby_chick front-facing_baby_chick; songbird = bird; penguin; dove/pigeon
  = dove; eagle; *duck; swan; goose; *owl; dodo; flamingo; *peacock; parrot; crow/raven = black_bird
water animal: whale = whale spouting_whale; *dolphin; seal; killer whale/orca = orca; fish; *clownfish = tropical_fish;
  pufferfish/blowfish = blowfish; *shark; octopus; seashell = spiral_shell; coral; jellyfish; crab; *lobster;
  shrimp/prawn = shrimp; squid; oyster; frog; crocodile/alligator = crocodile; *turtle/tortoise = turtle
small animal: lizard/gecko = lizard; snake; snail; *butterfly; caterpillar = bug; ant; *honeybee/bee = honeybee; beetle;
  ladybug/ladybird = lady_beetle; *grasshopper = cricket; cockroach; spider; scorpion; mosquito; housefly = fly; worm;
  dragon = dragon dragon_face; long-necked dinosaur = sauropod; tyrannosaurus = T-Rex
plant: bouquet; cherry blossom; rose; *hibiscus; sunflower; daisy = blossom; tulip; *hyacinth; lotus; seedling/sprout =
  seedling; potted plant; fir/evergreen = evergreen_tree; leafy tree = deciduous_tree; *palm = palm_tree; *cactus; sheaf
  of rice; herb; shamrock; four-leaf clover = four_leaf_clover; *maple leaf; autumn leaf = fallen_leaf; toadstool =
  mushroom; brown mushroom; wilted flower; leafless tree; empty nest; nest with eggs; log = wood; rock; Christmas tree
fruit: bunch of grapes = grapes; melon; watermelon; tangerine/orange = tangerine; *lemon; lime; banana; pineapple;
  *mango; red apple; green apple; pear; *peach; pair of cherries = cherries; *strawberry; *handful of blueberries =
  blueberries; kiwi = kiwi_fruit; tomato; olive; coconut; avocado
vegetable: eggplant/aubergine = eggplant; potato; *carrot; ear of corn; *chili pepper = hot_pepper; bell pepper;
  cucumber; *head of broccoli = broccoli; head of garlic = garlic; onion; peanut = peanuts; chestnut; ginger root; pea
  pod; head of lettuce = leafy_green
meal: loaf of bread = bread; *croissant; baguette = baguette_bread; flatbread; *pretzel; bagel; stack of pancakes =
  pancakes; *waffle; wedge of cheese/piece of cheese = cheese_wedge; joint of meat = meat_on_bone; chicken leg =
  poultry_leg; steak = cut_of_meat; strip of bacon = bacon; *hamburger/burger = hamburger; packet of fries =
  french_fries; *slice of pizza = pizza; hot dog; sandwich; *taco; burrito; tamale; kebab = stuffed_flatbread; falafel;
  egg; fried egg = cooking; pan of paella = shallow_pan_of_food; pot of stew = pot_of_food; bowl of cereal =
  bowl_with_spoon; bowl of salad = green_salad; bucket of popcorn = popcorn; stick of butter = butter; salt shaker =
  salt; can of food = canned_food; bento box; rice cracker; rice ball; bowl of rice = cooked_rice; plate of curry =
  curry_rice; bowl of noodles = steaming_bowl; *plate of spaghetti = spaghetti; sweet potato = roasted_sweet_potato;
  piece of sushi = sushi; fried shrimp; *dumpling
dessert: fortune cookie; takeout box; ice cream cone = soft_ice_cream; shaved ice; bowl of ice cream = ice_cream;
  *doughnut/donut = doughnut; cookie; birthday cake; slice of cake = shortcake; cupcake; *pie; chocolate bar; piece of
  candy = candy; *lollipop; custard pudding = custard; honey pot; moon cake; dango skewer = dango
drink: baby bottle; glass of milk; cup of coffee = hot_beverage; *teapot; cup of tea = teacup_without_handle; champagne
  bottle = bottle_with_popping_cork; glass of wine/wine glass = wine_glass; cocktail = cocktail_glass; tropical drink;
  mug of beer/beer mug = beer_mug; glass of whisky = tumbler_glass; soft drink = cup_with_straw; *bubble tea; juice box
  = beverage_box; ice cube = ice; pair of chopsticks = chopsticks; spoon; kitchen knife; glass jar = jar; amphora
land vehicle: steam train = locomotive; train; bullet train = high-speed_train bullet_train; streetcar/tram = tram;
  monorail; bus = bus oncoming_bus; trolleybus; minibus; *ambulance; fire engine/fire truck = fire_engine; police car =
  police_car oncoming_police_car; taxi/cab = taxi oncoming_taxi; car/automobile = automobile oncoming_automobile; *jeep
  = sport_utility_vehicle; pickup truck; delivery truck; *tractor; semi-trailer/lorry = articulated_lorry; racing car;
  motorcycle/motorbike = motorcycle; moped = motor_scooter; wheelchair = manual_wheelchair motorized_wheelchair;
  rickshaw = auto_rickshaw; *bicycle/bike = bicycle; kick scooter; *skateboard; roller skate; sled; wheel; fuel pump;
  bus stop; *traffic light = horizontal_traffic_light vertical_traffic_light; stop sign; road barrier = construction
boat or aircraft: *sailboat; *canoe; speedboat; cruise ship = passenger_ship; ferry; motorboat = motor_boat; cargo ship
  = ship; airplane/plane = airplane; propeller plane = small_airplane; parachute; *helicopter; cable car =
  mountain_cableway aerial_tramway; satellite; *rocket; flying saucer; anchor; lifebuoy = ring_buoy
building: house; house with garden; office building; post office = Japanese_post_office post_office; *hospital; bank;
  hotel; school; department store; factory; Japanese castle; castle; *church; mosque; temple = hindu_temple; synagogue;
  torii gate = shinto_shrine; fountain; tent; stadium; classical building; hut; abandoned house = derelict_house;
  construction crane = building_construction; ferris wheel; roller coaster; circus tent; carousel horse; lattice tower =
  Tokyo_tower; statue = Statue_of_Liberty; stone head = moai; volcano; mountain = mountain snow-capped_mountain; desert
  island; bridge = bridge_at_night; *barber pole; postbox; mailbox = closed_mailbox_with_lowered_flag
  closed_mailbox_with_raised_flag open_mailbox_with_lowered_flag open_mailbox_with_raised_flag; playground slide
clothing: pair of glasses = glasses; pair of sunglasses = sunglasses; pair of goggles = goggles; lab coat; safety vest;
  necktie/tie = necktie; t-shirt; pair of jeans = jeans; *scarf; pair of gloves = gloves; coat; pair of socks = socks;
  *dress; *kimono; sari; swimsuit = one-piece_swimsuit; pair of underpants = briefs; pair of shorts = shorts; bikini;
  blouse = woman’s_clothes; flip-flop = thong_sandal; leather shoe = man’s_shoe; running shoe/sneaker = running_shoe;
  hiking boot; flat shoe; *high heel = high-heeled_shoe; sandal = woman’s_sandal; pair of ballet shoes = ballet_shoes;
  boot = woman’s_boot; crown; sun hat = woman’s_hat; *top hat; graduation cap; baseball cap = billed_cap; army helmet =
  military_helmet; rescue helmet = rescue_worker’s_helmet
accessory: purse; *handbag; clutch bag; pair of shopping bags = shopping_bags; *backpack; suitcase = luggage; briefcase;
  comb = hair_pick; ring; lipstick; diamond = gem_stone; umbrella = umbrella closed_umbrella umbrella_with_rain_drops;
  folding fan = folding_hand_fan; wristwatch = watch; string of beads = prayer_beads; bottle of nail polish =
  nail_polish
tool: *hammer; *axe; pickaxe = pick; *screwdriver; wrench/spanner = wrench; handsaw = carpentry_saw; dagger; archery bow
  = bow_and_arrow; shield; boomerang; cogwheel = gear; clamp; balance scale; chain = chains; hook; toolbox; magnet;
  ladder; *shovel; bolt = nut_and_bolt; test tube; petri dish; microscope; *telescope; satellite dish =
  satellite_antenna; syringe; pill = pill; sticking plaster = adhesive_bandage; crutch; stethoscope; fire extinguisher;
  plunger; mouse trap; razor; broom; bucket; key; old key; padlock = locked unlocked; *pair of scissors = scissors;
  safety pin; sewing needle; spool of thread = thread; ball of yarn = yarn; knot; compass; thermometer; oil drum; brick
furniture: door; elevator; mirror; window; bed; *sofa/couch = couch_and_lamp; chair; toilet; shower; *bathtub; lotion
  bottle = lotion_bottle; *basket; toilet roll = roll_of_paper; bar of soap = soap; toothbrush; sponge; shopping cart;
  filing cabinet = file_cabinet; wastebasket; red lantern = red_paper_lantern; flashlight = flashlight; *candle; oil
  lamp = diya_lamp; light bulb; picture frame = framed_picture; clock = mantelpiece_clock; alarm clock; stopwatch;
  hourglass = hourglass_done hourglass_not_done; coffin; gravestone = headstone; urn = funeral_urn
stationery: pencil; fountain pen; pen; paintbrush; crayon; notepad = spiral_notepad; clipboard; pushpin; paperclip;
  *ruler = straight_ruler; set square = triangular_ruler; *envelope; parcel = package; newspaper; red book =
  closed_book; green book; blue book; orange book; open book; stack of books = books; scroll; map = world_map;
  magnifying glass = magnifying_glass_tilted_left magnifying_glass_tilted_right; abacus; wad of cash = dollar_banknote;
  coin; money bag; credit card; receipt; ticket; name tag = label
electronics: electric plug; battery; desktop computer; *laptop; printer; keyboard; computer mouse; trackball; floppy
  disk; compact disc = optical_disk; movie camera; film projector; clapperboard = clapper_board; television/TV =
  television; camera = camera camera_with_flash; *camcorder = video_camera; videocassette; mobile phone; *telephone;
  phone receiver = telephone_receiver; pager; fax machine; radio; studio microphone; microphone; loudspeaker; megaphone;
  headset = headphone; game controller = video_game; joystick; slot machine; *robot
toy: teddy bear; *kite; yo-yo; billiard ball = pool_8_ball; crystal ball; magic wand; die = game_die; *puzzle piece;
  piñata; disco ball = mirror_ball; pawn = chess_pawn; palette = artist_palette; *balloon; *gift/present = wrapped_gift;
  ribbon; trophy; sports medal; firecracker; sparkler; treasure chest; bomb; water pistol; jack-o-lantern; nesting doll
  = nesting_dolls; bell; confetti ball; wind chime; party popper
sport: soccer ball; baseball; softball; *basketball; volleyball; american football; rugby ball = rugby_football; *tennis
  racket = tennis; frisbee = flying_disc; bowling ball = bowling; cricket bat = cricket_game; field hockey stick =
  field_hockey; ice hockey stick = ice_hockey; lacrosse stick = lacrosse; table tennis bat = ping_pong; badminton racket
  = badminton; boxing glove; karate suit = martial_arts_uniform; goal = goal_net; golf hole = flag_in_hole; ice skate;
  fishing rod = fishing_pole; diving mask; *pair of skis = skis; curling stone; dartboard = bullseye
instrument: *guitar; *violin; trumpet; saxophone; accordion; banjo; drum; long drum; pair of maracas = maracas; flute;
  harp; *trombone; piano keyboard = musical_keyboard
sky: sun = sun sun_with_face; crescent moon = crescent_moon first_quarter_moon_face last_quarter_moon_face; cloud;
  rainbow; *snowman = snowman snowman_without_snow; snowflake; lightning bolt = high_voltage; flame = fire; comet;
  *ringed planet; globe = globe_showing_Americas globe_showing_Asia-Australia globe_showing_Europe-Africa; full moon =
  full_moon full_moon_face; tornado; wave = water_wave; water drop = droplet; rain cloud = cloud_with_rain; snow cloud =
  cloud_with_snow; storm cloud = cloud_with_lightning
person: baby; boy; girl; old man; old woman; *astronaut; firefighter; police officer; construction worker; detective;
  guard; ninja; prince; *princess; farmer; chef/cook = cook; student; singer; artist; teacher; factory worker;
  programmer = technologist; office worker; mechanic; scientist; *pilot; judge; doctor = health_worker; wizard = mage;
  fairy; *vampire; mermaid; elf; genie; zombie; superhero; supervillain; Santa Claus; ghost; alien; clown = clown_face;
  troll
"""


@dataclass(frozen=True)
class Object:
    """One class: `names[0]` is its label, the others are synonyms; `drawings` are emoji names."""

    kind: str
    names: tuple[str, ...]
    drawings: tuple[str, ...]
    unseen: bool

    @property
    def name(self) -> str:
        """The class name."""
        return self.names[0]


@cache
def all_objects() -> tuple[Object, ...]:
    """Return every object, seen and unseen, in the table's order."""
    return tuple(_parse(kind, entry) for kind, entries in _kinds() for entry in entries.split(";"))


def seen_objects() -> tuple[Object, ...]:
    """Return the objects that training scenes are made of."""
    return tuple(thing for thing in all_objects() if not thing.unseen)


def unseen_objects() -> tuple[Object, ...]:
    """Return the objects that appear in no training scene and no training caption."""
    return tuple(thing for thing in all_objects() if thing.unseen)


def scene_only_objects() -> tuple[Object, ...]:
    """Return every second seen object: those that training shows only beside other objects, never alone."""
    return seen_objects()[::2]


def _kinds() -> list[tuple[str, str]]:
    """Split the table into (kind, entries); an indented line goes on with the one before."""
    lines = _TABLE.strip().replace("\n  ", " ").splitlines()
    return [(kind, entries) for kind, _, entries in (line.partition(":") for line in lines)]


def _parse(kind: str, entry: str) -> Object:
    names, _, drawings = entry.strip().removeprefix("*").partition("=")
    synonyms = tuple(name.strip() for name in names.split("/"))
    own_drawing = synonyms[0].replace(" ", "_")
    return Object(kind, synonyms, tuple(drawings.split()) or (own_drawing,), entry.strip().startswith("*"))

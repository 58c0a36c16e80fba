"""The data of `mlalign demo`: what people say to a voice assistant, in seven languages and four scripts.

An utterance is a template filled with slot values, and both exist in every language, so each combination
(template, slot values) is one sentence with seven parallel versions and one answer. The answer does not depend on the
language: the intent and the types of the slots that occur, as in "alarm_set; date; time".

`build(seed)` deals the combinations out to the parts of the demo. The labels to learn from are English only; the other
languages occur in unlabelled text and in bitext, and, with labels, in the test set. The spelling is that of a speech
recogniser: no capital at the start and no punctuation mark at the end.
"""

import itertools
import random
import re
from collections import Counter
from typing import NamedTuple

LANGUAGES = {
    "en": "English",
    "de": "German",
    "es": "Spanish",
    "sv": "Swedish",
    "ru": "Russian",
    "el": "Greek",
    "hi": "Hindi",
}
PIVOT = "en"
SEPARATOR = " =>"  # ends every prompt

COMBINATIONS_PER_TEMPLATE = 240  # at most, so that templates with three slots do not drown the others
TEST_ROWS = 84
PARALLEL_SENTENCES = 120
DEV_ROWS = 64
BITEXT_DEV_PAIRS = 20  # per language
ANSWER_LINES = 1000  # in the unlabelled text
TRAIN_SHARE = 0.35  # of the combinations left after the held-out ones; the rest goes to the bitext

# Cells stand in the order of LANGUAGES and are separated by "|" or a line break. Values of one slot type that need
# another grammatical form stand in a table of their own: its name goes on after "_", which is no part of the type.
SLOTS = {
    "time": """
        at six | um sechs | a las seis | klockan sex | в шесть часов | στις έξι | छह बजे
        at seven | um sieben | a las siete | klockan sju | в семь часов | στις εφτά | सात बजे
        at eight | um acht | a las ocho | klockan åtta | в восемь часов | στις οχτώ | आठ बजे
        at nine | um neun | a las nueve | klockan nio | в девять часов | στις εννιά | नौ बजे
        at eleven | um elf | a las once | klockan elva | в одиннадцать часов | στις έντεκα | ग्यारह बजे
        at noon | um zwölf Uhr mittags | al mediodía | klockan tolv på dagen | в полдень | το μεσημέρι | दोपहर बारह बजे
        at half past six | um halb sieben | a las seis y media | klockan halv sju
            в половине седьмого | στις εξίμισι | साढ़े छह बजे
        at half past eight | um halb neun | a las ocho y media | klockan halv nio
            в половине девятого | στις οχτώμισι | साढ़े आठ बजे
        at quarter past five | um Viertel nach fünf | a las cinco y cuarto | klockan kvart över fem
            в четверть шестого | στις πέντε και τέταρτο | सवा पाँच बजे
        at quarter to ten | um Viertel vor zehn | a las diez menos cuarto | klockan kvart i tio
            без четверти десять | στις δέκα παρά τέταρτο | पौने दस बजे
    """,
    "date": """
        today | heute | hoy | i dag | сегодня | σήμερα | आज
        tomorrow | morgen | mañana | i morgon | завтра | αύριο | कल
        the day after tomorrow | übermorgen | pasado mañana | i övermorgon | послезавтра | μεθαύριο | परसों
        on Monday | am Montag | el lunes | på måndag | в понедельник | τη Δευτέρα | सोमवार को
        on Tuesday | am Dienstag | el martes | på tisdag | во вторник | την Τρίτη | मंगलवार को
        on Wednesday | am Mittwoch | el miércoles | på onsdag | в среду | την Τετάρτη | बुधवार को
        on Thursday | am Donnerstag | el jueves | på torsdag | в четверг | την Πέμπτη | गुरुवार को
        on Friday | am Freitag | el viernes | på fredag | в пятницу | την Παρασκευή | शुक्रवार को
        on Saturday | am Samstag | el sábado | på lördag | в субботу | το Σάββατο | शनिवार को
        on Sunday | am Sonntag | el domingo | på söndag | в воскресенье | την Κυριακή | रविवार को
    """,
    "city_in": """
        in Berlin | in Berlin | en Berlín | i Berlin | в Берлине | στο Βερολίνο | बर्लिन में
        in Paris | in Paris | en París | i Paris | в Париже | στο Παρίσι | पेरिस में
        in Moscow | in Moskau | en Moscú | i Moskva | в Москве | στη Μόσχα | मॉस्को में
        in Athens | in Athen | en Atenas | i Aten | в Афинах | στην Αθήνα | एथेंस में
        in Stockholm | in Stockholm | en Estocolmo | i Stockholm | в Стокгольме | στη Στοκχόλμη | स्टॉकहोम में
        in Madrid | in Madrid | en Madrid | i Madrid | в Мадриде | στη Μαδρίτη | मैड्रिड में
        in Delhi | in Delhi | en Delhi | i Delhi | в Дели | στο Δελχί | दिल्ली में
        in London | in London | en Londres | i London | в Лондоне | στο Λονδίνο | लंदन में
        in Rome | in Rom | en Roma | i Rom | в Риме | στη Ρώμη | रोम में
        in Vienna | in Wien | en Viena | i Wien | в Вене | στη Βιέννη | वियना में
    """,
    "city_to": """
        to Berlin | nach Berlin | a Berlín | till Berlin | в Берлин | για το Βερολίνο | बर्लिन की
        to Paris | nach Paris | a París | till Paris | в Париж | για το Παρίσι | पेरिस की
        to Moscow | nach Moskau | a Moscú | till Moskva | в Москву | για τη Μόσχα | मॉस्को की
        to Athens | nach Athen | a Atenas | till Aten | в Афины | για την Αθήνα | एथेंस की
        to Stockholm | nach Stockholm | a Estocolmo | till Stockholm | в Стокгольм | για τη Στοκχόλμη | स्टॉकहोम की
        to Madrid | nach Madrid | a Madrid | till Madrid | в Мадрид | για τη Μαδρίτη | मैड्रिड की
        to Delhi | nach Delhi | a Delhi | till Delhi | в Дели | για το Δελχί | दिल्ली की
        to London | nach London | a Londres | till London | в Лондон | για το Λονδίνο | लंदन की
        to Rome | nach Rom | a Roma | till Rom | в Рим | για τη Ρώμη | रोम की
        to Vienna | nach Wien | a Viena | till Wien | в Вену | για τη Βιέννη | वियना की
    """,
    "room": """
        in the kitchen | in der Küche | en la cocina | i köket | на кухне | στην κουζίνα | रसोई में
        in the bedroom | im Schlafzimmer | en el dormitorio | i sovrummet | в спальне | στην κρεβατοκάμαρα | बेडरूम में
        in the living room | im Wohnzimmer | en el salón | i vardagsrummet | в гостиной | στο σαλόνι | बैठक में
        in the bathroom | im Bad | en el baño | i badrummet | в ванной | στο μπάνιο | बाथरूम में
        in the hallway | im Flur | en el pasillo | i hallen | в коридоре | στον διάδρομο | गलियारे में
        in the garage | in der Garage | en el garaje | i garaget | в гараже | στο γκαράζ | गैराज में
        in the garden | im Garten | en el jardín | i trädgården | в саду | στον κήπο | बगीचे में
        in the study | im Arbeitszimmer | en el despacho | i arbetsrummet | в кабинете | στο γραφείο | अध्ययन कक्ष में
        in the cellar | im Keller | en el sótano | i källaren | в подвале | στο υπόγειο | तहखाने में
        on the balcony | auf dem Balkon | en el balcón | på balkongen | на балконе | στο μπαλκόνι | बालकनी में
    """,
    "device": """
        the radio | das Radio | la radio | radion | радио | το ραδιόφωνο | रेडियो
        the television | den Fernseher | la televisión | teven | телевизор | την τηλεόραση | टीवी
        the heating | die Heizung | la calefacción | värmen | отопление | τη θέρμανση | हीटर
        the fan | den Ventilator | el ventilador | fläkten | вентилятор | τον ανεμιστήρα | पंखा
        the oven | den Backofen | el horno | ugnen | духовку | τον φούρνο | ओवन
        the washing machine | die Waschmaschine | la lavadora | tvättmaskinen
            стиральную машину | το πλυντήριο | वॉशिंग मशीन
        the coffee machine | die Kaffeemaschine | la cafetera | kaffebryggaren | кофеварку | την καφετιέρα | कॉफ़ी मशीन
        the printer | den Drucker | la impresora | skrivaren | принтер | τον εκτυπωτή | प्रिंटर
        the vacuum cleaner | den Staubsauger | la aspiradora | dammsugaren
            пылесос | την ηλεκτρική σκούπα | वैक्यूम क्लीनर
        the computer | den Computer | el ordenador | datorn | компьютер | τον υπολογιστή | कंप्यूटर
    """,
    "genre": """
        jazz | Jazz | jazz | jazz | джаз | τζαζ | जैज़
        rock | Rock | rock | rock | рок | ροκ | रॉक
        blues | Blues | blues | blues | блюз | μπλουζ | ब्लूज़
        reggae | Reggae | reggae | reggae | регги | ρέγκε | रेगे
        pop music | Popmusik | música pop | popmusik | поп-музыку | ποπ μουσική | पॉप संगीत
        classical music | klassische Musik | música clásica | klassisk musik
            классическую музыку | κλασική μουσική | शास्त्रीय संगीत
        dance music | Tanzmusik | música de baile | dansmusik | танцевальную музыку | χορευτική μουσική | डांस म्यूज़िक
        folk songs | Volkslieder | canciones populares | folkvisor | народные песни | δημοτικά τραγούδια | लोकगीत
    """,
    "artist": """
        Mozart | Mozart | Mozart | Mozart | Моцарта | του Μότσαρτ | मोत्सार्ट
        Bach | Bach | Bach | Bach | Баха | του Μπαχ | बाख
        Beethoven | Beethoven | Beethoven | Beethoven | Бетховена | του Μπετόβεν | बीथोवन
        Vivaldi | Vivaldi | Vivaldi | Vivaldi | Вивальди | του Βιβάλντι | विवाल्डी
        Madonna | Madonna | Madonna | Madonna | Мадонны | της Μαντόνα | मैडोना
        Adele | Adele | Adele | Adele | Адель | της Αντέλ | अडेल
        Elvis | Elvis | Elvis | Elvis | Элвиса | του Έλβις | एल्विस
        the Beatles | den Beatles | los Beatles | Beatles | Битлз | των Μπιτλς | बीटल्स
    """,
    "person_told": """
        Anna | Anna | a Ana | Anna | Анне | στην Άννα | अन्ना को
        Peter | Peter | a Pedro | Peter | Петру | στον Πέτρο | पीटर को
        Maria | Maria | a María | Maria | Марии | στη Μαρία | मारिया को
        my mother | meiner Mutter | a mi madre | min mamma | моей маме | στη μητέρα μου | मेरी माँ को
        my father | meinem Vater | a mi padre | min pappa | моему папе | στον πατέρα μου | मेरे पिताजी को
        my brother | meinem Bruder | a mi hermano | min bror | моему брату | στον αδερφό μου | मेरे भाई को
        my sister | meiner Schwester | a mi hermana | min syster | моей сестре | στην αδερφή μου | मेरी बहन को
        my boss | meinem Chef | a mi jefe | min chef | моему начальнику | στο αφεντικό μου | मेरे बॉस को
        my neighbour | meinem Nachbarn | a mi vecino | min granne | моему соседу | στον γείτονά μου | मेरे पड़ोसी को
        the doctor | dem Arzt | al médico | läkaren | врачу | στον γιατρό | डॉक्टर को
    """,
    "person_called": """
        Anna | Anna | a Ana | Anna | Анне | την Άννα | अन्ना को
        Peter | Peter | a Pedro | Peter | Петру | τον Πέτρο | पीटर को
        Maria | Maria | a María | Maria | Марии | τη Μαρία | मारिया को
        my mother | meine Mutter | a mi madre | min mamma | моей маме | τη μητέρα μου | मेरी माँ को
        my father | meinen Vater | a mi padre | min pappa | моему папе | τον πατέρα μου | मेरे पिताजी को
        my brother | meinen Bruder | a mi hermano | min bror | моему брату | τον αδερφό μου | मेरे भाई को
        my sister | meine Schwester | a mi hermana | min syster | моей сестре | την αδερφή μου | मेरी बहन को
        my boss | meinen Chef | a mi jefe | min chef | моему начальнику | το αφεντικό μου | मेरे बॉस को
        my neighbour | meinen Nachbarn | a mi vecino | min granne | моему соседу | τον γείτονά μου | मेरे पड़ोसी को
        the doctor | den Arzt | al médico | läkaren | врачу | τον γιατρό | डॉक्टर को
    """,
    "message": """
        that I will be late | dass ich mich verspäte | que llegaré tarde | att jag blir sen
            что я опоздаю | ότι θα αργήσω | कि मुझे देर होगी
        that I am at home | dass ich zu Hause bin | que estoy en casa | att jag är hemma
            что я дома | ότι είμαι στο σπίτι | कि मैं घर पर हूँ
        that I am on my way | dass ich unterwegs bin | que estoy en camino | att jag är på väg
            что я уже в пути | ότι είμαι στον δρόμο | कि मैं रास्ते में हूँ
        that I am not well | dass es mir nicht gut geht | que no me encuentro bien | att jag inte mår bra
            что я плохо себя чувствую | ότι δεν είμαι καλά | कि मेरी तबीयत ठीक नहीं है
        that I have no time | dass ich keine Zeit habe | que no tengo tiempo | att jag inte har tid
            что у меня нет времени | ότι δεν έχω χρόνο | कि मेरे पास समय नहीं है
        that dinner is ready | dass das Essen fertig ist | que la cena está lista | att maten är klar
            что ужин готов | ότι το φαγητό είναι έτοιμο | कि खाना तैयार है
        that the train is late | dass der Zug Verspätung hat | que el tren va con retraso | att tåget är försenat
            что поезд опаздывает | ότι το τρένο έχει καθυστέρηση | कि ट्रेन लेट है
        that everything is fine | dass alles in Ordnung ist | que todo va bien | att allt är bra
            что всё в порядке | ότι όλα είναι καλά | कि सब ठीक है
    """,
    "duration": """
        five minutes | fünf Minuten | cinco minutos | fem minuter | пять минут | πέντε λεπτά | पाँच मिनट
        ten minutes | zehn Minuten | diez minutos | tio minuter | десять минут | δέκα λεπτά | दस मिनट
        fifteen minutes | fünfzehn Minuten | quince minutos | femton minuter
            пятнадцать минут | δεκαπέντε λεπτά | पंद्रह मिनट
        twenty minutes | zwanzig Minuten | veinte minutos | tjugo minuter | двадцать минут | είκοσι λεπτά | बीस मिनट
        thirty minutes | dreißig Minuten | treinta minutos | trettio minuter | тридцать минут | τριάντα λεπτά | तीस मिनट
        forty minutes | vierzig Minuten | cuarenta minutos | fyrtio minuter | сорок минут | σαράντα λεπτά | चालीस मिनट
        two hours | zwei Stunden | dos horas | två timmar | два часа | δύο ώρες | दो घंटे
        three hours | drei Stunden | tres horas | tre timmar | три часа | τρεις ώρες | तीन घंटे
    """,
    "food": """
        milk | Milch | leche | mjölk | молоко | γάλα | दूध
        bread | Brot | pan | bröd | хлеб | ψωμί | ब्रेड
        eggs | Eier | huevos | ägg | яйца | αυγά | अंडे
        cheese | Käse | queso | ost | сыр | τυρί | पनीर
        coffee | Kaffee | café | kaffe | кофе | καφέ | कॉफ़ी
        rice | Reis | arroz | ris | рис | ρύζι | चावल
        butter | Butter | mantequilla | smör | масло | βούτυρο | मक्खन
        sugar | Zucker | azúcar | socker | сахар | ζάχαρη | चीनी
        tea | Tee | té | te | чай | τσάι | चाय
        flour | Mehl | harina | mjöl | муку | αλεύρι | आटा
    """,
    "food_fresh": """
        apples | Äpfel | manzanas | äpplen | яблоки | μήλα | सेब
        bananas | Bananen | plátanos | bananer | бананы | μπανάνες | केले
        oranges | Orangen | naranjas | apelsiner | апельсины | πορτοκάλια | संतरे
        lemons | Zitronen | limones | citroner | лимоны | λεμόνια | नींबू
        grapes | Trauben | uvas | vindruvor | виноград | σταφύλια | अंगूर
        tomatoes | Tomaten | tomates | tomater | помидоры | ντομάτες | टमाटर
        potatoes | Kartoffeln | patatas | potatis | картошку | πατάτες | आलू
        onions | Zwiebeln | cebollas | lök | лук | κρεμμύδια | प्याज़
        carrots | Karotten | zanahorias | morötter | морковь | καρότα | गाजर
        fish | Fisch | pescado | fisk | рыбу | ψάρι | मछली
    """,
    "dish": """
        pancakes | Pfannkuchen | tortitas | pannkakor | блины | τηγανίτες | पैनकेक
        lasagne | Lasagne | lasaña | lasagne | лазанью | λαζάνια | लज़ान्या
        pizza | Pizza | pizza | pizza | пиццу | πίτσα | पिज़्ज़ा
        risotto | Risotto | risotto | risotto | ризотто | ριζότο | रिसोट्टो
        tomato soup | Tomatensuppe | sopa de tomate | tomatsoppa | томатный суп | ντοματόσουπα | टमाटर का सूप
        fish soup | Fischsuppe | sopa de pescado | fisksoppa | рыбный суп | ψαρόσουπα | मछली का सूप
        potato salad | Kartoffelsalat | ensalada de patata | potatissallad
            картофельный салат | πατατοσαλάτα | आलू का सलाद
        fried rice | gebratenen Reis | arroz frito | stekt ris | жареный рис | τηγανητό ρύζι | फ्राइड राइस
        apple pie | Apfelkuchen | tarta de manzana | äppelpaj | яблочный пирог | μηλόπιτα | ऐपल पाई
        chocolate cake | Schokoladenkuchen | tarta de chocolate | chokladtårta
            шоколадный торт | τούρτα σοκολάτα | चॉकलेट केक
    """,
    "event_new": """
        a meeting | eine Besprechung | una reunión | ett möte | совещание | μια σύσκεψη | मीटिंग
        a dentist appointment | einen Zahnarzttermin | una cita con el dentista | en tandläkartid
            приём у стоматолога | ένα ραντεβού με τον οδοντίατρο | डेंटिस्ट की अपॉइंटमेंट
        a birthday party | eine Geburtstagsfeier | una fiesta de cumpleaños | ett födelsedagskalas
            день рождения | ένα πάρτι γενεθλίων | जन्मदिन की पार्टी
        an exam | eine Prüfung | un examen | ett prov | экзамен | ένα διαγώνισμα | परीक्षा
        a job interview | ein Vorstellungsgespräch | una entrevista de trabajo | en anställningsintervju
            собеседование | μια συνέντευξη για δουλειά | नौकरी का इंटरव्यू
        a football match | ein Fußballspiel | un partido de fútbol | en fotbollsmatch
            футбольный матч | έναν ποδοσφαιρικό αγώνα | फ़ुटबॉल मैच
        a guitar lesson | eine Gitarrenstunde | una clase de guitarra | en gitarrlektion
            урок гитары | ένα μάθημα κιθάρας | गिटार की क्लास
        a parents' evening | einen Elternabend | una reunión de padres | ett föräldramöte
            родительское собрание | μια συνάντηση γονέων | अभिभावकों की बैठक
    """,
    "event_old": """
        the meeting | die Besprechung | la reunión | mötet | совещание | τη σύσκεψη | मीटिंग
        the dentist appointment | den Zahnarzttermin | la cita con el dentista | tandläkartiden
            приём у стоматолога | το ραντεβού με τον οδοντίατρο | डेंटिस्ट की अपॉइंटमेंट
        the birthday party | die Geburtstagsfeier | la fiesta de cumpleaños | födelsedagskalaset
            день рождения | το πάρτι γενεθλίων | जन्मदिन की पार्टी
        the exam | die Prüfung | el examen | provet | экзамен | το διαγώνισμα | परीक्षा
        the job interview | das Vorstellungsgespräch | la entrevista de trabajo | anställningsintervjun
            собеседование | τη συνέντευξη για δουλειά | नौकरी का इंटरव्यू
        the football match | das Fußballspiel | el partido de fútbol | fotbollsmatchen
            футбольный матч | τον ποδοσφαιρικό αγώνα | फ़ुटबॉल मैच
        the guitar lesson | die Gitarrenstunde | la clase de guitarra | gitarrlektionen
            урок гитары | το μάθημα κιθάρας | गिटार की क्लास
        the parents' evening | den Elternabend | la reunión de padres | föräldramötet
            родительское собрание | τη συνάντηση γονέων | अभिभावकों की बैठक
    """,
    "topic": """
        about politics | über Politik | sobre política | om politik | о политике | για την πολιτική | राजनीति की
        about sport | über Sport | sobre deportes | om sport | о спорте | για τον αθλητισμό | खेल की
        about the economy | über die Wirtschaft | sobre economía | om ekonomin
            об экономике | για την οικονομία | अर्थव्यवस्था की
        about technology | über Technik | sobre tecnología | om teknik | о технологиях | για την τεχνολογία | तकनीक की
        about science | über Wissenschaft | sobre ciencia | om vetenskap | о науке | για την επιστήμη | विज्ञान की
        about culture | über Kultur | sobre cultura | om kultur | о культуре | για τον πολιτισμό | संस्कृति की
        about health | über Gesundheit | sobre salud | om hälsa | о здоровье | για την υγεία | स्वास्थ्य की
        about films | über Filme | sobre cine | om film | о кино | για τον κινηματογράφο | सिनेमा की
        about the election | über die Wahl | sobre las elecciones | om valet | о выборах | για τις εκλογές | चुनाव की
        about the environment | über die Umwelt | sobre el medio ambiente | om miljön
            об экологии | για το περιβάλλον | पर्यावरण की
    """,
    "destination": """
        to the airport | zum Flughafen | al aeropuerto | till flygplatsen
            в аэропорт | για το αεροδρόμιο | हवाई अड्डे के लिए
        to the station | zum Bahnhof | a la estación | till stationen | на вокзал | για τον σταθμό | स्टेशन के लिए
        to the hotel | zum Hotel | al hotel | till hotellet | в гостиницу | για το ξενοδοχείο | होटल के लिए
        to the hospital | zum Krankenhaus | al hospital | till sjukhuset | в больницу | για το νοσοκομείο | अस्पताल के लिए
        to the museum | zum Museum | al museo | till museet | в музей | για το μουσείο | संग्रहालय के लिए
        to the theatre | zum Theater | al teatro | till teatern | в театр | για το θέατρο | थिएटर के लिए
        to the university | zur Universität | a la universidad | till universitetet
            в университет | για το πανεπιστήμιο | विश्वविद्यालय के लिए
        to the harbour | zum Hafen | al puerto | till hamnen | в порт | για το λιμάνι | बंदरगाह के लिए
        to the stadium | zum Stadion | al estadio | till stadion | на стадион | για το γήπεδο | स्टेडियम के लिए
        to the market | zum Markt | al mercado | till torget | на рынок | για την αγορά | बाज़ार के लिए
    """,
    "people": """
        two people | zwei Personen | dos personas | två personer | двоих | δύο άτομα | दो लोगों
        three people | drei Personen | tres personas | tre personer | троих | τρία άτομα | तीन लोगों
        four people | vier Personen | cuatro personas | fyra personer | четверых | τέσσερα άτομα | चार लोगों
        five people | fünf Personen | cinco personas | fem personer | пятерых | πέντε άτομα | पाँच लोगों
        six people | sechs Personen | seis personas | sex personer | шестерых | έξι άτομα | छह लोगों
        seven people | sieben Personen | siete personas | sju personer | семерых | εφτά άτομα | सात लोगों
        eight people | acht Personen | ocho personas | åtta personer | восьмерых | οχτώ άτομα | आठ लोगों
    """,
    "todo": """
        to water the flowers | die Blumen zu gießen | regar las flores | att vattna blommorna
            полить цветы | να ποτίσω τα λουλούδια | फूलों को पानी देने
        to pay the rent | die Miete zu zahlen | pagar el alquiler | att betala hyran
            заплатить за квартиру | να πληρώσω το νοίκι | किराया देने
        to take out the rubbish | den Müll rauszubringen | sacar la basura | att gå ut med soporna
            вынести мусор | να βγάλω τα σκουπίδια | कूड़ा बाहर रखने
        to feed the cat | die Katze zu füttern | dar de comer al gato | att mata katten
            покормить кошку | να ταΐσω τη γάτα | बिल्ली को खाना देने
        to charge the phone | das Handy aufzuladen | cargar el móvil | att ladda telefonen
            зарядить телефон | να φορτίσω το κινητό | फ़ोन चार्ज करने
        to wash the car | das Auto zu waschen | lavar el coche | att tvätta bilen
            помыть машину | να πλύνω το αυτοκίνητο | गाड़ी धोने
        to take my tablets | meine Tabletten zu nehmen | tomar las pastillas | att ta mina tabletter
            принять таблетки | να πάρω τα χάπια μου | दवा लेने
        to pack the suitcase | den Koffer zu packen | hacer la maleta | att packa resväskan
            собрать чемодан | να φτιάξω τη βαλίτσα | सूटकेस पैक करने
    """,
}

TEMPLATES = {
    "alarm_set": """
        wake me up {time} | weck mich {time} | despiértame {time} | väck mig {time}
            разбуди меня {time} | ξύπνα με {time} | मुझे {time} जगा देना
        wake me up {date} {time} | weck mich {date} {time} | despiértame {date} {time} | väck mig {date} {time}
            разбуди меня {date} {time} | ξύπνα με {date} {time} | मुझे {date} {time} जगा देना
        I need an alarm {date} {time} | ich brauche {date} {time} einen Wecker
            necesito una alarma {date} {time} | jag behöver ett alarm {date} {time}
            мне нужен будильник {date} {time} | χρειάζομαι ξυπνητήρι {date} {time}
            मुझे {date} {time} का अलार्म चाहिए
    """,
    "alarm_cancel": """
        I do not need an alarm {date} | ich brauche {date} keinen Wecker | no necesito alarma {date}
            jag behöver inget alarm {date} | мне не нужен будильник {date}
            δεν χρειάζομαι ξυπνητήρι {date} | मुझे {date} अलार्म नहीं चाहिए
        do not wake me {date} {time} | weck mich {date} {time} nicht | no me despiertes {date} {time}
            väck mig inte {date} {time} | не буди меня {date} {time}
            μη με ξυπνήσεις {date} {time} | मुझे {date} {time} मत जगाना
    """,
    "weather_query": """
        will it rain {date} | wird es {date} regnen | va a llover {date} | kommer det att regna {date}
            будет ли дождь {date} | θα βρέξει {date} | क्या {date} बारिश होगी
        is it cold {city_in} | ist es {city_in} kalt | hace frío {city_in} | är det kallt {city_in}
            холодно ли {city_in} | κάνει κρύο {city_in} | क्या {city_in} ठंड है
        what will the weather be like {city_in} {date} | wie wird das Wetter {date} {city_in}
            qué tiempo hará {date} {city_in} | hur blir vädret {city_in} {date}
            какая погода будет {date} {city_in} | τι καιρό θα κάνει {date} {city_in}
            {date} {city_in} मौसम कैसा रहेगा
        do I need an umbrella {city_in} {date} | brauche ich {date} {city_in} einen Regenschirm
            necesito paraguas {date} {city_in} | behöver jag paraply {city_in} {date}
            нужен ли мне зонт {date} {city_in} | χρειάζομαι ομπρέλα {date} {city_in}
            क्या मुझे {date} {city_in} छाते की ज़रूरत होगी
    """,
    "train_query": """
        when does the next train {city_to} leave | wann fährt der nächste Zug {city_to}
            cuándo sale el próximo tren {city_to} | när går nästa tåg {city_to}
            когда отправляется следующий поезд {city_to} | πότε φεύγει το επόμενο τρένο {city_to}
            {city_to} अगली ट्रेन कब छूटेगी
        find me a train {city_to} {date} | such mir {date} einen Zug {city_to}
            búscame un tren {city_to} {date} | hitta ett tåg {city_to} {date}
            найди мне поезд {city_to} {date} | βρες μου τρένο {city_to} {date}
            {date} {city_to} कोई ट्रेन ढूँढो
    """,
    "taxi_book": """
        call a taxi {destination} | ruf ein Taxi {destination} | pide un taxi {destination}
            beställ en taxi {destination} | вызови такси {destination} | κάλεσε ένα ταξί {destination}
            {destination} टैक्सी बुलाओ
        I need a taxi {destination} {date} {time} | ich brauche {date} {time} ein Taxi {destination}
            necesito un taxi {destination} {date} {time} | jag behöver en taxi {destination} {date} {time}
            мне нужно такси {destination} {date} {time} | χρειάζομαι ταξί {destination} {date} {time}
            मुझे {date} {time} {destination} टैक्सी चाहिए
    """,
    "table_book": """
        book a table for {people} {date} {time} | reserviere {date} {time} einen Tisch für {people}
            reserva una mesa para {people} {date} {time} | boka ett bord för {people} {date} {time}
            забронируй столик на {people} {date} {time} | κλείσε τραπέζι για {people} {date} {time}
            {date} {time} {people} के लिए टेबल बुक करो
        find a restaurant {city_in} for {people} | such ein Restaurant {city_in} für {people}
            busca un restaurante {city_in} para {people} | hitta en restaurang {city_in} för {people}
            найди ресторан {city_in} на {people} | βρες ένα εστιατόριο {city_in} για {people}
            {city_in} {people} के लिए रेस्तराँ ढूँढो
    """,
    "music_play": """
        play {genre} {room} | spiel {room} {genre} | pon {genre} {room} | spela {genre} {room}
            включи {genre} {room} | βάλε {genre} {room} | {room} {genre} बजाओ
        we want to listen to {genre} {time} | wir möchten {time} {genre} hören | queremos escuchar {genre} {time}
            vi vill lyssna på {genre} {time} | мы хотим послушать {genre} {time}
            θέλουμε να ακούσουμε {genre} {time} | हम {time} {genre} सुनना चाहते हैं
        play music by {artist} {room} | spiel {room} Musik von {artist} | pon música de {artist} {room}
            spela musik av {artist} {room} | включи музыку {artist} {room}
            βάλε μουσική {artist} {room} | {room} {artist} का संगीत बजाओ
    """,
    "lights_on": """
        turn on the light {room} {time} | mach {time} das Licht {room} an | enciende la luz {room} {time}
            tänd lampan {room} {time} | включи свет {room} {time} | άναψε το φως {room} {time}
            {time} {room} बत्ती जला देना
        it is too dark {room} | es ist zu dunkel {room} | está demasiado oscuro {room} | det är för mörkt {room}
            слишком темно {room} | είναι πολύ σκοτεινά {room} | {room} बहुत अँधेरा है
    """,
    "lights_off": """
        turn off the light {room} {time} | mach {time} das Licht {room} aus | apaga la luz {room} {time}
            släck lampan {room} {time} | выключи свет {room} {time} | σβήσε το φως {room} {time}
            {time} {room} बत्ती बुझा देना
        we do not need any light {room} | wir brauchen {room} kein Licht | no necesitamos luz {room}
            vi behöver inget ljus {room} | нам не нужен свет {room} | δεν χρειαζόμαστε φως {room}
            हमें {room} बत्ती नहीं चाहिए
    """,
    "device_on": """
        switch on {device} {time} | schalte {device} {time} ein | enciende {device} {time} | sätt på {device} {time}
            включи {device} {time} | άνοιξε {device} {time} | {time} {device} चालू करो
    """,
    "device_off": """
        switch off {device} {time} | schalte {device} {time} aus | apaga {device} {time} | stäng av {device} {time}
            выключи {device} {time} | κλείσε {device} {time} | {time} {device} बंद करो
    """,
    "message_send": """
        send a message to {person_told} | schick {person_told} eine Nachricht | envía un mensaje {person_told}
            skicka ett meddelande till {person_told} | отправь {person_told} сообщение
            στείλε μήνυμα {person_told} | {person_told} मैसेज भेजो
        tell {person_told} {message} | sag {person_told}, {message} | dile {person_told} {message}
            säg till {person_told} {message} | скажи {person_told}, {message}
            πες {person_told} {message} | {person_told} बता दो {message}
        write to {person_told} {message} | schreib {person_told}, {message} | escríbele {person_told} {message}
            skriv till {person_told} {message} | напиши {person_told}, {message}
            γράψε {person_told} {message} | {person_told} लिखो {message}
    """,
    "call_make": """
        call {person_called} | ruf {person_called} an | llama {person_called} | ring {person_called}
            позвони {person_called} | πάρε τηλέφωνο {person_called} | {person_called} फ़ोन करो
        call {person_called} {date} {time} | ruf {person_called} {date} {time} an
            llama {person_called} {date} {time} | ring {person_called} {date} {time}
            позвони {person_called} {date} {time} | πάρε τηλέφωνο {person_called} {date} {time}
            {date} {time} {person_called} फ़ोन करना
    """,
    "timer_set": """
        start a timer for {duration} {time} | starte {time} einen Timer für {duration}
            inicia {time} un temporizador de {duration} | starta en timer på {duration} {time}
            запусти {time} таймер на {duration} | ξεκίνα {time} χρονόμετρο για {duration}
            {time} {duration} का टाइमर शुरू करो
        tell me when {duration} are over | sag mir Bescheid, wenn {duration} um sind | avísame cuando pasen {duration}
            säg till när {duration} har gått | скажи мне, когда пройдёт {duration}
            πες μου όταν περάσουν {duration} | {duration} होने पर मुझे बताना
    """,
    "reminder_set": """
        remind me {todo} | erinnere mich daran, {todo} | recuérdame {todo} | påminn mig om {todo}
            напомни мне {todo} | θύμισέ μου {todo} | मुझे {todo} की याद दिलाना
        remind me {date} {time} {todo} | erinnere mich {date} {time} daran, {todo}
            recuérdame {date} {time} {todo} | påminn mig {date} {time} om {todo}
            напомни мне {date} {time} {todo} | θύμισέ μου {date} {time} {todo}
            मुझे {date} {time} {todo} की याद दिलाना
        I must not forget {todo} {date} | ich darf nicht vergessen, {date} {todo} | no debo olvidar {todo} {date}
            jag får inte glömma {todo} {date} | мне нельзя забыть {date} {todo}
            δεν πρέπει να ξεχάσω {todo} {date} | मुझे {date} {todo} की बात नहीं भूलनी चाहिए
    """,
    "list_add": """
        put {food} and {food_fresh} on the shopping list | setz {food} und {food_fresh} auf die Einkaufsliste
            apunta {food} y {food_fresh} en la lista de la compra
            skriv upp {food} och {food_fresh} på inköpslistan
            добавь {food} и {food_fresh} в список покупок
            βάλε {food} και {food_fresh} στη λίστα με τα ψώνια
            ख़रीदारी की सूची में {food} और {food_fresh} जोड़ो
        we want to buy {food} and {food_fresh} {date} | wir wollen {date} {food} und {food_fresh} kaufen
            queremos comprar {food} y {food_fresh} {date} | vi vill köpa {food} och {food_fresh} {date}
            мы хотим купить {food} и {food_fresh} {date} | θέλουμε να αγοράσουμε {food} και {food_fresh} {date}
            हम {date} {food} और {food_fresh} ख़रीदना चाहते हैं
    """,
    "recipe_find": """
        how do I make {dish} | wie macht man {dish} | cómo puedo preparar {dish} | hur gör man {dish}
            как приготовить {dish} | πώς φτιάχνω {dish} | {dish} कैसे बनाते हैं
        we want to make {dish} {date} | wir wollen {date} {dish} machen | queremos preparar {dish} {date}
            vi vill göra {dish} {date} | мы хотим приготовить {dish} {date}
            θέλουμε να φτιάξουμε {dish} {date} | हम {date} {dish} बनाना चाहते हैं
    """,
    "calendar_add": """
        plan {event_new} {date} | plane {date} {event_new} | programa {event_new} {date} | planera {event_new} {date}
            запланируй {event_new} {date} | προγραμμάτισε {event_new} {date} | {date} {event_new} तय करो
        put {event_new} {date} {time} in my calendar | trag {date} {time} {event_new} in meinen Kalender ein
            apunta {event_new} {date} {time} en mi calendario | lägg in {event_new} {date} {time} i min kalender
            запиши {event_new} {date} {time} в мой календарь | βάλε {event_new} {date} {time} στο ημερολόγιό μου
            मेरे कैलेंडर में {date} {time} {event_new} जोड़ो
    """,
    "calendar_cancel": """
        cancel {event_old} {date} | sag {event_old} {date} ab | cancela {event_old} {date} | ställ in {event_old} {date}
            отмени {event_old} {date} | ακύρωσε {event_old} {date} | {date} {event_old} रद्द करो
        delete {event_old} {date} {time} from my calendar | lösch {event_old} {date} {time} aus meinem Kalender
            borra {event_old} {date} {time} de mi calendario | ta bort {event_old} {date} {time} från min kalender
            удали {event_old} {date} {time} из моего календаря | σβήσε {event_old} {date} {time} από το ημερολόγιό μου
            मेरे कैलेंडर से {date} {time} {event_old} हटाओ
    """,
    "calendar_query": """
        what is in my calendar {date} | was steht {date} in meinem Kalender | qué hay en mi calendario {date}
            vad står i min kalender {date} | что у меня в календаре {date}
            τι έχω στο ημερολόγιό μου {date} | मेरे कैलेंडर में {date} क्या है
        do I have time {date} {time} | habe ich {date} {time} Zeit | tengo tiempo {date} {time}
            har jag tid {date} {time} | есть ли у меня время {date} {time}
            έχω χρόνο {date} {time} | क्या {date} {time} मेरे पास समय है
    """,
    "news_read": """
        read me the latest news {topic} | lies mir die neuesten Nachrichten {topic} vor
            léeme las últimas noticias {topic} | läs upp de senaste nyheterna {topic}
            прочитай мне последние новости {topic} | διάβασέ μου τα τελευταία νέα {topic}
            मुझे {topic} ताज़ा ख़बरें सुनाओ
        read me news {topic} {date} {time} | lies mir {date} {time} Nachrichten {topic} vor
            léeme {date} {time} noticias {topic} | läs upp nyheter {topic} {date} {time}
            прочитай мне {date} {time} новости {topic} | διάβασέ μου {date} {time} νέα {topic}
            मुझे {date} {time} {topic} ख़बरें सुनाना
    """,
}


class DemoData(NamedTuple):
    """The parts of the demo. No combination of `test` or `parallel` occurs anywhere else, in any language."""

    text: list[str]  # unlabelled, all languages mixed, one sentence (or list of answer words) per item
    train: list[dict[str, str]]  # labelled rows, English only: id, lang, prompt, completion
    dev: list[dict[str, str]]  # the same, for the dev loss
    bitext: list[dict[str, str]]  # unlabelled pairs with English: id, src, tgt, src_lang, tgt_lang
    bitext_dev: list[dict[str, str]]
    test: dict[str, list[dict[str, str]]]  # language -> labelled rows, equal ids in every language
    parallel: dict[str, list[str]]  # language -> distinct sentences, line n says the same in every language


class Sentence(NamedTuple):
    """One combination of a template and slot values."""

    id: str
    answer: str  # "intent; slot type; slot type", slot types sorted
    surface: dict[str, str]  # language -> utterance


def build(seed: int) -> DemoData:
    """Deal the combinations out to the parts of the demo; the same seed gives the same data."""
    rng = random.Random(seed)
    sentences = _combinations(rng)
    rng.shuffle(sentences)
    test, parallel, dev, rest = _deal(sentences, [TEST_ROWS, PARALLEL_SENTENCES, DEV_ROWS])
    train, pairs = _deal(rest, [round(TRAIN_SHARE * len(rest))])
    others = [language for language in LANGUAGES if language != PIVOT]
    pairs_dev, pairs = _deal(pairs, [BITEXT_DEV_PAIRS * len(others)])

    text = [sentence.surface[language] for sentence in rest for language in LANGUAGES]
    text += [_answer_words(rng) for _ in range(ANSWER_LINES)]
    rng.shuffle(text)
    return DemoData(
        text=text,
        train=[_labelled(sentence, PIVOT) for sentence in train],
        dev=[_labelled(sentence, PIVOT) for sentence in dev],
        bitext=[_pair(sentence, language) for sentence in pairs for language in others],
        bitext_dev=[_pair(sentence, language) for sentence, language in zip(pairs_dev, itertools.cycle(others))],
        test={language: [_labelled(sentence, language) for sentence in test] for language in LANGUAGES},
        parallel={language: [sentence.surface[language] for sentence in parallel] for language in LANGUAGES},
    )


def _combinations(rng: random.Random) -> list[Sentence]:
    """Sentences whose surface no other one shares, in any language; at most COMBINATIONS_PER_TEMPLATE a template."""
    values = {slot: _rows(table) for slot, table in SLOTS.items()}
    sentences = []
    for intent, table in TEMPLATES.items():
        for number, template in enumerate(_rows(table)):
            slots = sorted(re.findall(r"{(\w+)}", template[PIVOT]))
            fillings = list(itertools.product(*(range(len(values[slot])) for slot in slots)))
            for filling in rng.sample(fillings, min(len(fillings), COMBINATIONS_PER_TEMPLATE)):
                chosen = {slot: values[slot][n] for slot, n in zip(slots, filling)}
                sentences.append(
                    Sentence(
                        id="-".join([intent, str(number), *map(str, filling)]),
                        answer="; ".join([intent, *sorted({slot.split("_")[0] for slot in slots})]),
                        surface={
                            language: template[language].format(**{slot: row[language] for slot, row in chosen.items()})
                            for language in LANGUAGES
                        },
                    )
                )
    count = Counter((language, text) for sentence in sentences for language, text in sentence.surface.items())
    return [sentence for sentence in sentences if all(count[item] == 1 for item in sentence.surface.items())]


def _rows(table: str) -> list[dict[str, str]]:
    """Cells of a table -> one dict, language -> cell, for every len(LANGUAGES) cells."""
    cells = [cell.strip() for cell in re.split(r"[|\n]", table) if cell.strip()]
    width = len(LANGUAGES)
    return [dict(zip(LANGUAGES, cells[n : n + width], strict=True)) for n in range(0, len(cells), width)]


def _deal(items: list[Sentence], sizes: list[int]) -> list[list[Sentence]]:
    """Consecutive parts of the given sizes, and what is left as the last one."""
    ends = list(itertools.accumulate(sizes))
    return [items[start:end] for start, end in zip([0, *ends], [*ends, None])]


def _answer_words(rng: random.Random) -> str:
    """Words of the answers in random order, beside no utterance: a pretrained LLM has seen identifiers before, too."""
    words = [*TEMPLATES, *{slot.split("_")[0]: None for slot in SLOTS}]
    return f"{SEPARATOR} {'; '.join(rng.sample(words, rng.randint(1, 4)))}"


def _labelled(sentence: Sentence, language: str) -> dict[str, str]:
    prompt = sentence.surface[language] + SEPARATOR
    return {"id": sentence.id, "lang": language, "prompt": prompt, "completion": " " + sentence.answer}


def _pair(sentence: Sentence, language: str) -> dict[str, str]:
    src, tgt = sentence.surface[language], sentence.surface[PIVOT]
    return {"id": sentence.id, "src": src, "tgt": tgt, "src_lang": language, "tgt_lang": PIVOT}
